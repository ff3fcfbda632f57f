"""RCO (arXiv 2605.00649, section 3): which units go, and how many in which layer, learned together
by gradient on the model's own loss with the budget held exactly.

Every unit, an expert as in the paper or a channel, has one logit for "goes". A step draws masks
with Gumbel noise in antithetic pairs, each for windows of its own: the hard mask removes exactly
the budget, its gradient is that of the soft one. The gradient is projected on the surface where
the expected pruned share is the budget's, Adam makes a step, and a shift of all logits, found by
bisection, brings them back to the surface.

RCO learns for one budget. Members of a family are nested, so here the run goes through the
budgets: each starts from the logits of the one before, and what is gone stays gone. The divergence
from the full model is that of all tokens; the authors take the likeliest 20 of each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor, nn

from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers, experts_function, masked
from flexmoe.progress import Track, silent
from flexmoe.training import batches, check_step, divergence


@dataclass(frozen=True)
class RcoConfig:
    """Settings of a run, those of the authors: ``steps``, shared out over the budgets, ``draws``
    masks a step, each on ``windows`` windows; ``tau`` falls geometrically for every budget;
    ``spread`` is how much the prior counts. Only ``lr`` is another thing there: they have a logit
    for "stays" too, and Adam moves each of the two by it, so that their difference, the one logit
    here, moves twice as far; that lost more where it was tried (docs/log.md)."""

    steps: int = 200
    draws: int = 4
    windows: int = 4
    lr: float = 0.1
    tau: tuple[float, float] = (1.0, 0.05)
    spread: float = 5.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise FlexmoeError(f"learning takes at least 1 step, found {self.steps}")
        if self.draws < 2 or self.draws % 2:
            raise FlexmoeError(f"masks are drawn in pairs, found {self.draws} draws")


class Units:
    """All units of a model in one vector [X]: experts where scores are [E], channels where they
    are [E, I]. ``cost_X`` are their shares of the parameters that can go."""

    def __init__(self, layers: Sequence[ExpertLayer], score: Mapping[int, Tensor]):
        self.layers = layers
        self.shapes = [score[layer.index].shape for layer in layers]
        each = [
            layer.shape.channel_parameters * (layer.I if len(shape) == 1 else 1)
            for layer, shape in zip(layers, self.shapes, strict=True)
        ]
        sizes = [shape.numel() for shape in self.shapes]
        cost_X = torch.tensor(each, dtype=torch.float64).repeat_interleave(torch.tensor(sizes))
        self.cost_X, self.sizes = cost_X / cost_X.sum(), sizes

    def by_layer(self, value_X: Tensor) -> dict[int, Tensor]:
        """A vector [X] in the shape of the scores of every layer."""
        parts = zip(self.layers, value_X.split(self.sizes), self.shapes, strict=True)
        return {layer.index: part.view(shape) for layer, part, shape in parts}

    def prior(self, score: Mapping[int, Tensor]) -> Tensor:
        """How much each unit is needed at first, from 0 to 1 [X]: the scores of a layer's experts
        between its least and its largest, as in the paper; the ranks of all channels."""
        found = [score[layer.index].double() for layer in self.layers]
        if len(self.shapes[0]) == 1:
            spans = [(s.max() - s.min()).clamp_min(1e-30) for s in found]
            return torch.cat([(s - s.min()) / span for s, span in zip(found, spans, strict=True)])
        flat_X = torch.cat([s.flatten() for s in found])
        rank_X = torch.empty_like(flat_X)
        rank_X[flat_X.argsort(stable=True)] = torch.linspace(0, 1, len(flat_X)).double()
        return rank_X

    def hardest(self, logit_X: Tensor, pruned: float) -> Tensor:
        """True for the units with the largest logits, as near to the share as they allow [X]."""
        order_X = logit_X.argsort(descending=True, stable=True)
        gone_X = torch.cat([torch.zeros(1), self.cost_X[order_X].cumsum(0)])
        goes_X = torch.zeros(len(order_X), dtype=torch.bool)
        goes_X[order_X[: int((gone_X - pruned).abs().argmin())]] = True
        return goes_X

    def retract(self, logit_X: Tensor, pruned: float) -> Tensor:
        """Logits shifted so that the expected pruned share is exact."""
        low, high = -60.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            too_many = float((torch.sigmoid(logit_X + middle) * self.cost_X).sum()) > pruned
            low, high = (low, middle) if too_many else (middle, high)
        return logit_X + (low + high) / 2

    def project(self, vector_X: Tensor, logit_X: Tensor) -> Tensor:
        """A vector [X] without its part that leaves the surface of the budget."""
        share_X = torch.sigmoid(logit_X)
        normal_X = share_X * (1 - share_X) * self.cost_X
        along = (vector_X @ normal_X) / (normal_X @ normal_X).clamp_min(1e-30)
        return vector_X - along * normal_X


def learn_order(
    model: nn.Module,
    ids: Tensor,
    score: Mapping[int, Tensor],
    budgets: Sequence[float],
    config: RcoConfig,
    *,
    seed: int = 0,
    track: Track = silent,
) -> dict[int, Tensor]:
    """Scores in the shape of ``score`` ([E] or [E, I] by layer) whose global cut at each of the
    ``budgets`` (rising shares) is what RCO keeps there; learned on windows ``ids`` [n, t] from
    ``score`` as a prior. All weights are left frozen."""
    units = Units(expert_layers(model), score)
    logit_X = config.spread * (0.5 - units.prior(score))
    stage_X, last_X = torch.full((len(logit_X),), len(budgets)), logit_X
    config = replace(config, steps=math.ceil(config.steps / max(1, len(budgets))))
    for stage, pruned in enumerate(budgets):
        gone_X = stage_X < stage
        logit_X = learn_mask(model, ids, units, logit_X, gone_X, pruned, config, seed, track)
        last_X = torch.where(gone_X, last_X, logit_X)
        goes_X = units.hardest(logit_X.masked_fill(gone_X, math.inf), pruned)
        stage_X[goes_X & ~gone_X] = stage
    order_X = last_X.argsort(descending=True, stable=True)
    order_X = order_X[stage_X[order_X].argsort(stable=True)]
    place_X = torch.empty(len(order_X), dtype=torch.float64)
    place_X[order_X] = torch.arange(len(order_X), dtype=torch.float64)
    return units.by_layer(place_X)


def learn_mask(
    model: nn.Module,
    ids: Tensor,
    units: Units,
    logit_X: Tensor,
    gone_X: Tensor,
    pruned: float,
    config: RcoConfig,
    seed: int = 0,
    track: Track = silent,
) -> Tensor:
    """The logits [X] of one budget, learned from ``logit_X``; units of ``gone_X`` stay gone."""
    fixed = 60.0  # a logit that no noise brings back
    device = next(model.parameters()).device
    logit_X = units.retract(logit_X.masked_fill(gone_X, fixed), pruned).masked_fill(gone_X, fixed)
    mean_X, square_X = torch.zeros(2, *logit_X.shape, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    drawn = batches(ids, config.windows, config.steps * config.draws, seed)
    with masked(units.layers):
        for step in track(range(config.steps), f"rco {pruned:g}"):
            first, last = config.tau
            tau = first * (last / first) ** (step / max(1, config.steps - 1))
            grad_X = torch.zeros_like(logit_X)
            for draw, batch in enumerate(islice(drawn, config.draws)):
                if draw % 2 == 0:
                    uniform = torch.rand(2, len(logit_X), generator=generator).double()
                    gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
                    noise_X = gumbel[0] - gumbel[1]
                sign = 1 - 2 * (draw % 2)
                grad_X += _slope(
                    model, batch.to(device), units, logit_X + sign * noise_X, gone_X, pruned, tau
                )
            check_step(grad_X)
            grad_X = units.project(grad_X.masked_fill(gone_X, 0) / config.draws, logit_X)
            mean_X = 0.9 * mean_X + 0.1 * grad_X
            square_X = 0.999 * square_X + 0.001 * grad_X.square()
            root_X = (square_X / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
            moved_X = logit_X - config.lr * mean_X / (1 - 0.9 ** (step + 1)) / root_X
            logit_X = units.retract(moved_X.masked_fill(gone_X, fixed), pruned)
            logit_X = logit_X.masked_fill(gone_X, fixed)
            mean_X = units.project(mean_X, logit_X)
    return logit_X


def _slope(
    model: nn.Module,
    batch: Tensor,
    units: Units,
    noisy_X: Tensor,
    gone_X: Tensor,
    pruned: float,
    tau: float,
) -> Tensor:
    """Gradient [X] of the divergence, a mean over tokens, by the noisy logits."""
    with torch.no_grad():
        teacher = model(input_ids=batch, use_cache=False).logits
    leaf_X = noisy_X.clone().requires_grad_(True)
    hard_X = 1.0 - units.hardest(noisy_X.masked_fill(gone_X, math.inf), pruned).double()
    soft_X = torch.sigmoid(-leaf_X / tau)
    mask_X = (hard_X + soft_X - soft_X.detach()).to(batch.device)
    for layer, part in zip(units.layers, units.by_layer(mask_X).values(), strict=True):
        layer.module.flexmoe_mask_EI = part.view(layer.E, -1).expand(layer.E, layer.I)
    with experts_function(model, "flexmoe_mask"):
        student = model(input_ids=batch, use_cache=False).logits
        loss = divergence(student, teacher) / batch[:, 1:].numel()
        return torch.autograd.grad(loss, leaf_X)[0]
