"""Learned widths: one number per channel says at which pruned share it goes.

A budget is a threshold on these positions, so the one vector that is trained holds every member of
the family, nested and exact at every moment. Training starts from the global cut of the scores
and improves all budgets in one run; all weights are frozen.

Each step draws a few budgets, jitters the positions, cuts, and asks the backward pass what every
channel at the edge of the cut is worth to the loss: the gradient of its mask. The loss is the
divergence from the full model, whose gradient carries no noise of the labels. Near a cut a
channel is half of the time in and half of the time out, and the mean of the two slopes is its
value up to third order; a slope taken only where it is in (as one-shot and progressive scores do)
is off by the curvature. Subtracting the mean value at the edge keeps the step on the surface of
the budget (as RCO does, arXiv 2605.00649), and dividing by the spread of the values makes budgets
with small and with large losses move at the same pace. Two halves of the windows vote apart, and
the step shrinks to what they agree on. Draws come in antithetic pairs.

The paper's own recipe is in `actions`; docs/log.md compares them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice

import torch
from torch import Tensor, nn

from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers, experts_function, masked
from flexmoe.memory import MicroBatch
from flexmoe.progress import Steps, Track, silent
from flexmoe.resume import Saved
from flexmoe.sharding import in_step, is_sharded
from flexmoe.training import (
    activations_recomputed,
    add_up,
    batches,
    check_step,
    divergence,
    part_of,
    processes,
)

MIXES = (0.0, 0.5, 1.0)  # how far from the start to what was learned the result may lie
CHECKED = (0.2, 0.4, 0.6, 0.8)


@dataclass(frozen=True)
class LearnConfig:
    """Settings of the run, measured in docs/log.md. Positions, jitter and step size are pruned
    shares: a channel at the edge with a typical surplus moves ``step_size`` later in one step;
    ``jitter`` falls from the first to the second value, ``step_size`` to 0. ``reach`` bounds the
    budgets drawn, ``draws`` of them a step."""

    steps: int = 150
    step_size: float = 0.1
    jitter: tuple[float, float] = (0.1, 0.03)
    reach: tuple[float, float] = (0.05, 0.9)
    draws: int = 2

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise FlexmoeError(f"learning takes at least 1 step, found {self.steps}")


class Positions:
    """Position of every channel of a model in (0, 1) as one vector [X], and cuts of it."""

    def __init__(self, layers: Sequence[ExpertLayer], score: Mapping[int, Tensor]):
        self.layers = layers
        self.sizes = [layer.E * layer.I for layer in layers]
        self.parameters_X = torch.cat(
            [
                torch.full((size,), float(layer.shape.channel_parameters), dtype=torch.float64)
                for size, layer in zip(self.sizes, layers, strict=True)
            ]
        )
        self.value_X = self.spread(torch.cat([score[layer.index].flatten() for layer in layers]))

    def spread(self, value_X: Tensor) -> Tensor:
        """Positions in the order of ``value_X``: the share gone when half of the channel is."""
        sequence_X = value_X.argsort(stable=True)
        size_X = self.parameters_X[sequence_X]
        position_X = torch.empty(len(value_X), dtype=torch.float64)
        position_X[sequence_X] = (size_X.cumsum(0) - size_X / 2) / self.parameters_X.sum()
        return position_X

    def by_layer(self, value_X: Tensor) -> dict[int, Tensor]:
        """A vector [X] as [E, I] of every layer."""
        parts = zip(self.layers, value_X.split(self.sizes), strict=True)
        return {layer.index: part.view(layer.E, layer.I) for layer, part in parts}


def edge_step(position_X: Tensor, worth_2X: Tensor, pruned: float, jitter: float) -> Tensor:
    """How far positions move for one draw, in units of the step size.

    ``worth_2X`` is the worth of every channel by each half of the windows. What counts is the
    surplus over the mean at the edge, for channels near it, brought to spread 1 and multiplied by
    the share of its power on which the halves agree: where there is nothing but noise, as in
    members that lose little, channels stay where they are.
    """
    near_X = torch.exp(-0.5 * ((position_X - pruned) / jitter) ** 2)
    near_X = near_X / near_X.sum()
    surplus_2X = worth_2X - (near_X * worth_2X).sum(1, keepdim=True)
    power = float((near_X * surplus_2X.sum(0) ** 2).sum())
    agreed = 4 * float((near_X * surplus_2X[0] * surplus_2X[1]).sum())
    if power <= 0 or agreed <= 0:
        return torch.zeros_like(position_X)
    return near_X / near_X.max() * surplus_2X.sum(0) * min(agreed / power, 1.0) / power**0.5


def check_halves(batch_size: int) -> None:
    """`FlexmoeError` for a batch of one window, of which there are no halves to compare."""
    if batch_size < 2:
        raise FlexmoeError(
            f"learning compares two halves of a batch, found a batch of {batch_size}: use "
            "--batch-size 2 or more (with --micro-batch 1 it takes no more memory)"
        )


def learn_positions(
    model: nn.Module,
    ids: Tensor,
    score: Mapping[int, Tensor],
    config: LearnConfig,
    *,
    batch_size: int = 8,
    micro_batch: int | None = None,
    checkpointing: bool = False,
    seed: int = 0,
    saved: Saved | None = None,
    track: Track = silent,
) -> dict[int, Tensor]:
    """Improve the global cut of ``score`` [E, I] (by layer, in the order of the model's channels)
    on windows ``ids`` [n, t]; returns positions [E, I] in (0, 1), which are scores again: the
    lowest go first. All weights are left frozen. ``saved`` keeps the state for a restart."""
    layers = expert_layers(model)
    positions = Positions(layers, score)
    first_X = positions.value_X
    device = next(model.parameters()).device
    check_halves(batch_size)
    micro = MicroBatch(micro_batch or batch_size)
    model.requires_grad_(False)
    start = 0
    if saved is not None and (state := saved.load()) is not None:
        start, tensors = state
        positions.value_X = tensors["position"]
    drawn = islice(batches(ids, batch_size, config.steps, seed), start, None)
    with masked(layers):
        with activations_recomputed(model, checkpointing):
            tokens = batch_size * ids.shape[1]
            for step in track(Steps(start, config.steps, tokens), "learn"):
                batch, left = next(drawn), 1 - step / config.steps
                jitter = config.jitter[1] + (config.jitter[0] - config.jitter[1]) * left
                # of its own seed, so that a restart draws what an unbroken run would have
                generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
                noise_X = torch.randn(len(positions.value_X), generator=generator).double()
                moved_X = torch.zeros_like(positions.value_X)
                draws = []
                for k in range(config.draws):
                    place = (k + float(torch.rand(1, generator=generator))) / config.draws
                    pruned = config.reach[0] + (config.reach[1] - config.reach[0]) * place
                    jittered_X = positions.value_X + jitter * (noise_X if k % 2 == 0 else -noise_X)
                    draws.append((pruned, positions.spread(jittered_X) > pruned))
                kept = [positions.by_layer(kept_X.float()) for _, kept_X in draws]
                halves = []
                for half in range(2):
                    chosen = part_of(torch.arange(batch_size))
                    windows = batch[chosen[chosen % 2 == half]].to(device)
                    work = partial(_worth, model, layers, kept, windows)
                    if is_sharded(model):  # all processes make the same calls
                        halves.append(work(micro.size))
                    else:
                        halves.append(micro.run(work, max(1, len(windows))))
                for (pruned, _), *both in zip(draws, *halves, strict=True):
                    worth_2X = torch.stack(both)
                    check_step(worth_2X)
                    moved_X += edge_step(positions.value_X, worth_2X, pruned, jitter)
                positions.value_X = positions.spread(
                    positions.value_X + config.step_size * left * moved_X
                )
                if saved is not None and (saved.due or step + 1 == config.steps):
                    saved.save(step + 1, {"position": positions.value_X})
        mixed = [positions.spread(torch.lerp(first_X, positions.value_X, a)) for a in MIXES]
        positions.value_X = _best(model, positions, mixed, ids[: 4 * batch_size], micro.size)
    return positions.by_layer(positions.value_X)


@torch.no_grad()
def _best(
    model: nn.Module,
    positions: Positions,
    candidates: Sequence[Tensor],
    ids: Tensor,
    micro_batch: int,
) -> Tensor:
    """The candidate [X] with the lowest divergence from the full model, as a ratio to the first
    one's at four budgets: a run too short to learn anything ends no worse than it began."""
    world = processes()[1]
    windows = part_of(ids[: len(ids) // world * world])
    device = next(model.parameters()).device
    found = torch.zeros(len(candidates), len(CHECKED), dtype=torch.float64)
    for part in windows.split(micro_batch):
        part = part.to(device)
        teacher = model(input_ids=part, use_cache=False).logits
        for c, value_X in enumerate(candidates):
            for b, pruned in enumerate(CHECKED):
                masks = positions.by_layer((value_X > pruned).float())
                for layer in positions.layers:
                    layer.module.flexmoe_mask_EI = masks[layer.index].to(device)
                with experts_function(model, "flexmoe_mask"):
                    student = model(input_ids=part, use_cache=False).logits
                found[c, b] += float(divergence(student, teacher))
    add_up([found])
    return candidates[int((found / found[0].clamp_min(1e-12)).mean(1).argmin())]


def _worth(
    model: nn.Module,
    layers: Sequence[ExpertLayer],
    kept: Sequence[Mapping[int, Tensor]],
    windows: Tensor,
    size: int,
) -> list[Tensor]:
    """What every channel is worth in each of the members ``kept``: minus the gradient of the
    divergence from the full model with respect to its mask, float64 [X] on the CPU, summed over
    ``windows`` [n, t] of this and all other processes, ``size`` of them at a time."""
    parts: Sequence[Tensor] = windows.split(size) if len(windows) else ()
    if is_sharded(model):
        parts = in_step(parts, windows.new_zeros(1, 1))
    channels = sum(layer.E * layer.I for layer in layers)
    worths = [torch.zeros(channels, dtype=torch.float64) for _ in kept]
    for part in parts:
        with torch.no_grad():
            teacher = model(input_ids=part, use_cache=False).logits
        for mask, worth_X in zip(kept, worths, strict=True):
            leaves = []
            for layer in layers:
                leaf = mask[layer.index].to(part.device).requires_grad_(True)
                layer.module.flexmoe_mask_EI = leaf
                leaves.append(leaf)
            with experts_function(model, "flexmoe_mask"):
                student = model(input_ids=part, use_cache=False).logits
                slopes = torch.autograd.grad(divergence(student, teacher), leaves)
            worth_X -= torch.cat([slope.double().cpu().flatten() for slope in slopes])
    add_up(worths)
    return worths
