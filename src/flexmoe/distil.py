"""Distillation of a family from its own full-width weights: the training loop of `recover`.

The student is a member of the family, the teacher the model as it was before, at full width. All
members share one set of weights, so what is good for one budget can hurt another: the schemes say
which members a step looks at.

- ``family`` (default): the windows of every step are dealt to strata of the pruned share, 0 among
  them, so that each step improves all budgets at once at the cost of one. Each stratum's loss is
  divided by the root of what it was at the start, or the poorest would drown the others. Beside
  the teacher the next token itself counts a little (``labels``), which the paper's schemes have
  with a weight of 1.
- ``sp``: the paper's single point (arXiv 2606.27866, eq. 13-16): one budget, whose result serves
  all. The paper trains LoRA on the channels that this member keeps, by cross-entropy and KL.
- ``cp``: the paper's alternative: the full model by cross-entropy, and by KL the poorest member and
  random others, each scaled to the size of the full model's loss (AmoebaLLM's rule).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from flexmoe.family import set_budget
from flexmoe.memory import MicroBatch
from flexmoe.progress import Steps, Track, silent
from flexmoe.resume import Saved
from flexmoe.sharding import is_sharded
from flexmoe.statistics import token_loss
from flexmoe.training import (
    activations_recomputed,
    add_up,
    batches,
    check_step,
    divergence,
    part_of,
    processes,
)

SCHEMES = ("family", "sp", "cp")
LABELS = 0.1  # weight of the next token's cross-entropy beside the teacher's KL, see docs/log.md
STRATA = 4  # the full model, and equal stretches of pruned shares up to the poorest of the plan


@dataclass(frozen=True)
class Part:
    """Rows of a batch that one member is trained on: KL to the teacher and cross-entropy with the
    given weights; ``scaled``: times the full member's loss over this one's, of the batch."""

    pruned: float
    rows: Tensor
    divergence: float
    cross_entropy: float
    scaled: bool = False


class Swapped:
    """The trained weights and those they began with: one of the two stands in the model, the
    other one beside it. In place, so that optimizers and sharded parameters stay valid."""

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        self.other = [p.detach().clone() for p in parameters]

    @contextmanager
    def original(self) -> Iterator[None]:
        """The model as it was, inside the block."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for parameter, other in zip(self.parameters, self.other, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(other)
            other.copy_(kept)


def strata(poorest: float) -> list[tuple[float, float]]:
    """Stretches of pruned shares from which the members of a step are drawn: 0 itself, and equal
    ones up to the poorest budget."""
    step = poorest / (STRATA - 1)
    return [(0.0, 0.0), *((step * k, step * (k + 1)) for k in range(STRATA - 1))]


def parts_of_step(
    scheme: str,
    at: float,
    poorest: float,
    rows: int,
    step: int,
    weights: Sequence[float],
    seed: int,
    labels: float = LABELS,
) -> list[Part]:
    """Which member is trained on which rows of the batch of ``step``, drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    every = torch.arange(rows)
    if scheme == "sp":
        return [Part(at, every, 1.0, 1.0)]
    if scheme == "cp":
        between = [poorest * float(torch.rand(1, generator=generator)) for _ in range(2)]
        subs = [Part(share, every, 1.0, 0.0, scaled=True) for share in (poorest, *between)]
        return [Part(0.0, every, 0.0, 1.0), *subs]
    parts = []
    for k, (low, high) in enumerate(strata(poorest)):
        pruned = low + (high - low) * float(torch.rand(1, generator=generator))
        mine = every[(every + step * rows) % STRATA == k]
        if len(mine):
            parts.append(Part(pruned, mine, weights[k], labels * weights[k]))
    return parts


def stratum_weights(model: PreTrainedModel, ids: Tensor, poorest: float, micro: int) -> list[float]:
    """One over the root of each stratum's divergence before training, at its middle; the full
    model, which has none yet and must not pay for the others, counts twice the richest. Sum 1."""
    every = torch.arange(len(ids))
    middles = [Part((low + high) / 2, every, 1.0, 0.0) for low, high in strata(poorest)[1:]]
    total_P = _losses(model, nullcontext, ids, middles, micro)
    add_up([total_P])
    tokens = ids[:, 1:].numel()
    weight = [max(total / tokens, 1e-3) ** -0.5 for total in total_P.tolist()]
    weight = [2 * weight[0], *weight]
    return [w / sum(weight) for w in weight]


@dataclass(frozen=True)
class Schedule:
    """Steps and rates of a run: ``lr`` rises over the first twentieth and falls linearly to 0."""

    steps: int
    batch_size: int
    micro_batch: int
    lr: float
    seed: int

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        warm = max(1, self.steps // 20)
        return self.lr * min(1.0, (step + 1) / warm) * (1 - step / self.steps)


Teacher = Callable[[], AbstractContextManager[None]]
Result = TypeVar("Result")


def distil(
    model: PreTrainedModel,
    parameters: Sequence[nn.Parameter],
    teacher: Teacher,
    ids: Tensor,
    schedule: Schedule,
    *,
    scheme: str = "family",
    at: float = 0.4,
    labels: float = LABELS,
    checkpointing: bool = False,
    autocast: torch.dtype | None = None,
    saved: Saved | None = None,
    track: Track = silent,
) -> None:
    """Train ``parameters`` of ``model`` (which has a plan, see `flexmoe.load`) in place on windows
    ``ids`` [n, t]. ``teacher()`` makes the model the teacher while it is open."""
    optimizer = torch.optim.AdamW(parameters, lr=schedule.lr, betas=(0.9, 0.95), weight_decay=0.0)
    poorest = model.flexmoe_plan.budgets[-1]
    device = parameters[0].device
    model.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)
    start, weights = _restore(saved, parameters, optimizer)
    size = schedule.batch_size
    drawn = islice(batches(ids, size, schedule.steps, schedule.seed), start, None)
    if not weights and scheme == "family":
        probe = next(batches(ids, size, 1, schedule.seed))
        weights = stratum_weights(model, probe, poorest, schedule.micro_batch)
    micro = MicroBatch(schedule.micro_batch)
    mixed = torch.autocast(device.type, dtype=autocast, enabled=autocast is not None)

    def run(work: Callable[[int], Result], rows: int) -> Result:
        with mixed:  # sharded: all processes make the same calls
            return work(micro.size) if is_sharded(model) else micro.run(work, rows)

    def backward(batch: Tensor, parts: Sequence[Part], factors: list[float], size: int) -> None:
        optimizer.zero_grad()
        _backward(model, teacher, batch, parts, factors, size)

    try:
        with activations_recomputed(model, checkpointing):
            tokens = size * ids.shape[1]
            for step in track(Steps(start, schedule.steps, tokens), "recover"):
                for group in optimizer.param_groups:
                    group["lr"] = schedule.rate(step)
                batch = next(drawn)
                rows = len(batch)
                parts = parts_of_step(
                    scheme, at, poorest, rows, step, weights, schedule.seed, labels
                )
                factors = [1.0] * len(parts)
                if any(part.scaled for part in parts):
                    total_P = run(partial(_losses, model, teacher, batch, parts), rows)
                    add_up([total_P])
                    factors = _factors(parts, total_P)
                run(partial(backward, batch, parts, factors), rows)
                if processes()[1] > 1 and not is_sharded(model):
                    _sum_gradients(parameters)
                check_step(whole(torch.nn.utils.clip_grad_norm_(parameters, 1.0)))
                optimizer.step()
                if saved is not None and (saved.due or step + 1 == schedule.steps):
                    saved.save(step + 1, _state(parameters, optimizer, weights))
    finally:
        set_budget(model, 0.0)
        model.requires_grad_(False)


def _backward(
    model: PreTrainedModel,
    teacher: Teacher,
    batch: Tensor,
    parts: Sequence[Part],
    factors: Sequence[float],
    micro: int,
) -> None:
    """Add up the gradient of all parts, times their factors, over this process's windows of the
    batch."""
    tokens = batch[:, 1:].numel()
    sharded = is_sharded(model)
    # sharded gradients come averaged over processes, the others are added up afterwards
    scale = (processes()[1] if sharded else 1) / tokens
    for chosen, windows, taught in _taught(model, teacher, batch, micro):
        for part, factor in zip(parts, factors, strict=True):
            here = torch.isin(chosen, part.rows)
            idle = not here.any()
            if idle and not sharded:
                continue
            if idle:  # sharded weights are gathered by all processes together, also for nothing
                here[0] = True
            loss = _loss(model, part, windows[here], taught[here])
            (loss * (0.0 if idle else scale * factor)).backward()


@torch.no_grad()
def _losses(
    model: PreTrainedModel, teacher: Teacher, batch: Tensor, parts: Sequence[Part], micro: int
) -> Tensor:
    """The loss of each part [P], summed over this process's windows of the batch: all of them are
    rows of every part."""
    total_P = torch.zeros(len(parts), dtype=torch.float64)
    for _, windows, taught in _taught(model, teacher, batch, micro):
        for p, part in enumerate(parts):
            total_P[p] += float(_loss(model, part, windows, taught))
    return total_P


def _factors(parts: Sequence[Part], total_P: Tensor) -> list[float]:
    """What the loss of each part is multiplied by, from those of the whole batch: of the batch, so
    that the result does not depend on how it is split."""
    full = float(total_P[0])
    pairs = zip(parts, total_P.tolist(), strict=True)
    return [full / (total + 1e-8) if part.scaled else 1.0 for part, total in pairs]


def _taught(
    model: PreTrainedModel, teacher: Teacher, batch: Tensor, micro: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """This process's windows of the batch, ``micro`` at a time: their rows, their tokens and the
    teacher's logits."""
    for chosen in part_of(torch.arange(len(batch))).split(micro):
        windows = batch[chosen].to(next(model.parameters()).device)
        set_budget(model, 0.0)
        with teacher(), torch.no_grad():
            taught = model(input_ids=windows, use_cache=False).logits
        yield chosen, windows, taught


def _loss(model: PreTrainedModel, part: Part, windows: Tensor, taught: Tensor) -> Tensor:
    """The loss of a part's member, summed over the tokens of these windows."""
    set_budget(model, part.pruned)
    logits = model(input_ids=windows, use_cache=False).logits
    loss = torch.zeros((), device=logits.device)
    if part.divergence:
        loss = loss + part.divergence * divergence(logits, taught)
    if part.cross_entropy:
        loss = loss + part.cross_entropy * token_loss(logits, windows)
    return loss


def _sum_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Add gradients up over processes; what one did not touch, another may have."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    add_up([p.grad for p in parameters if p.grad is not None])


def _state(
    parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, weights: Sequence[float]
) -> dict[str, Tensor]:
    """Weights and moments, whole (of sharded parameters all processes must ask together)."""
    tensors = {"weights": torch.tensor(weights, dtype=torch.float64)}
    for n, parameter in enumerate(parameters):
        tensors[f"{n}.parameter"] = whole(parameter.detach())
        for name, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{n}.{name}"] = whole(value)
    return tensors


@torch.no_grad()
def _restore(
    saved: Saved | None, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[int, list[float]]:
    """Put the saved state back, if there is one; returns the step and the strata's weights."""
    if saved is None or (found := saved.load()) is None:
        return 0, []
    step, tensors = found
    for n, parameter in enumerate(parameters):
        parameter.copy_(like(tensors[f"{n}.parameter"], parameter))
        state = {name: tensors.get(f"{n}.{name}") for name in ("step", "exp_avg", "exp_avg_sq")}
        if state["exp_avg"] is not None:
            optimizer.state[parameter] = {
                name: value if name == "step" else like(value, parameter)
                for name, value in state.items()
                if value is not None
            }
    return step, tensors["weights"].tolist()


def whole(tensor: Tensor) -> Tensor:
    """A tensor that is not sharded, on the CPU."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu()


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """``value`` on the device of ``parameter``, and sharded as it is."""
    value = value.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return value
    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
