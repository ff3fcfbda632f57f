"""Statistics: named sums over tokens, and the one pass over calibration data that fills them.

A statistic is a decorated function. It returns a number per routed pair (and channel), and the
pass adds them up per expert in float64. All are sums (or maxima), so parts of a pass merge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import ExpertLayer, Routing, expert_layers, experts_function
from flexmoe.memory import MicroBatch
from flexmoe.progress import Track, silent
from flexmoe.sharding import is_sharded

THIN = 100  # fewer tokens than this are thin evidence for an expert


@dataclass(frozen=True)
class Pairs:
    """What a statistic sees of one layer and batch: S routed pairs sorted by expert.

    ``weight_S`` the routing weight the model really used; ``h_SI`` channel activations, the input
    of the down projection; ``grad_SI`` the gradient of the summed token loss at them (only for
    ``backward`` statistics, else None).
    """

    weight_S: Tensor
    h_SI: Tensor
    grad_SI: Tensor | None


@dataclass(frozen=True)
class Statistic:
    """``when``: ``forward`` and ``backward`` functions map `Pairs` to [S, I]; ``weights`` ones map
    (weight, gradient of the batch-mean loss), both [E, I, ...], to [E, I] once a batch.
    ``merge``: ``sum`` or ``max``."""

    name: str
    when: str
    merge: str
    function: Callable[..., Tensor]


STATISTICS: dict[str, Statistic] = {}


def statistic(name: str, *, when: str, merge: str = "sum") -> Callable:
    """Declare a statistic; methods ask for it by name in ``needs``."""
    if when not in ("forward", "backward", "weights") or merge not in ("sum", "max"):
        raise FlexmoeError(
            f"statistic '{name}': when={when!r}, merge={merge!r}; expected forward, backward or "
            "weights, and sum or max"
        )

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        STATISTICS[name] = Statistic(name, when, merge, function)
        return function

    return register


@dataclass
class LayerStatistics:
    """Sums of one layer, on the CPU: ``stats["fisher_EI"]`` ... and always ``stats["count_E"]``,
    the routed tokens of every expert; plus the tokens and batches of the pass and its seed."""

    values: dict[str, Tensor]
    tokens: int = 0
    batches: int = 0
    seed: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    @property
    def experts_per_token(self) -> int:
        """How many experts a token is sent to."""
        return round(float(self["count_E"].sum()) / max(self.tokens, 1))

    def to(self, device: torch.device | str) -> None:
        """Move the sums."""
        self.values = {name: value.to(device) for name, value in self.values.items()}

    def merge(self, other: LayerStatistics) -> None:
        """Add what another part of the pass saw."""
        for name, value in other.values.items():
            mine = self.values[name]
            self.values[name] = torch.maximum(mine, value) if is_max(name) else mine + value
        self.tokens += other.tokens
        self.batches += other.batches

    def scaled(self, factor: float) -> LayerStatistics:
        """As if ``factor`` times as many tokens of the same kind had been seen: sums grow with
        them, maxima stay."""
        values = {n: v.clone() if is_max(n) else v * factor for n, v in self.values.items()}
        tokens, batches = round(self.tokens * factor), round(self.batches * factor)
        return LayerStatistics(values, tokens, batches, self.seed)


Statistics = dict[int, LayerStatistics]


def is_max(name: str) -> bool:
    """Whether a statistic is a maximum over tokens, not a sum."""
    return name in STATISTICS and STATISTICS[name].merge == "max"


def empty_statistics(
    layers: Sequence[ExpertLayer], wanted: Sequence[Statistic], seed: int = 0
) -> Statistics:
    """Statistics that have seen nothing."""
    return {
        layer.index: LayerStatistics(
            {"count_E": torch.zeros(layer.E, dtype=torch.float64)}
            | {s.name: torch.zeros(layer.E, layer.I, dtype=torch.float64) for s in wanted},
            seed=seed,
        )
        for layer in layers
    }


def find_statistics(names: Iterable[str]) -> list[Statistic]:
    """The declared statistics of these names."""
    names = list(names)
    if not all(name in STATISTICS for name in names):
        from flexmoe.methods import all_methods

        all_methods()  # declares those that come with flexmoe
    for name in names:
        if name not in STATISTICS:
            raise did_you_mean(name, STATISTICS, "statistic")
    return [STATISTICS[name] for name in dict.fromkeys(names)]


class Observer:
    """Sits on one experts module during the pass and adds up in ``stats``, which stand where the
    module is."""

    stats: LayerStatistics

    def __init__(self, layer: ExpertLayer, wanted: Sequence[Statistic]):
        self.layer, self.wanted = layer, wanted

    def __call__(self, routing: Routing, h_SI: Tensor) -> Tensor:
        self.stats["count_E"].add_(torch.bincount(routing.expert_S, minlength=self.layer.E))
        forward = [s for s in self.wanted if s.when == "forward"]
        backward = [s for s in self.wanted if s.when == "backward"]
        weight_S = routing.weight_S.detach()
        self._add(forward, routing, Pairs(weight_S, h_SI.detach(), None))
        if backward and torch.is_grad_enabled():
            if not h_SI.requires_grad:  # first MoE layer of a frozen model: the graph starts here
                h_SI = h_SI.requires_grad_()
            kept = h_SI.detach()
            h_SI.register_hook(
                lambda grad: self._add(backward, routing, Pairs(weight_S, kept, grad))
            )
        return h_SI

    def _add(self, wanted: Sequence[Statistic], routing: Routing, pairs: Pairs) -> None:
        for s in wanted:
            value_SI = s.function(pairs)
            into = self.stats[s.name]
            for e, a, b in routing.segments:
                if s.merge == "max":
                    into[e] = torch.maximum(into[e], value_SI[a:b].amax(0))
                else:
                    into[e] += value_SI[a:b].sum(0, dtype=torch.float32)

    def add_weights(self, name: str, parameter: nn.Parameter, tokens: int) -> None:
        """Statistics of the weights' gradient, which is freed at once: one layer's lives."""
        assert parameter.grad is not None
        weights = self.layer.channel_major(name, parameter.detach())
        grads = self.layer.channel_major(name, parameter.grad)
        for s in self.wanted:
            if s.when == "weights":
                for weight, grad in zip(weights, grads, strict=True):
                    self.stats[s.name].add_(s.function(weight.float(), grad.float() / tokens))
        parameter.grad = None


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed next-token cross-entropy in float32, nats; ``ids`` [n, t], ``logits`` [n, t, V]."""
    predicted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="sum")


Look = Callable[[Tensor, Statistics], None]


@contextmanager
def watched(model: nn.Module, wanted: Sequence[Statistic]) -> Iterator[Look]:
    """Inside the block ``look(ids, into)`` runs the model on windows ``ids`` [n, t] and adds what
    its experts do to the statistics ``into``, which move to the model's device.

    Forward only when nothing asks for gradients. All weights are frozen but those a ``weights``
    statistic needs, so the backward pass is cheaper than a plain one. The loss is the sum over
    tokens: a token counts the same in any batch. Where memory runs out a batch goes in parts,
    except for ``weights`` statistics, which look at the gradient of the whole batch.
    """
    observers = [Observer(layer, wanted) for layer in expert_layers(model)]
    backward = any(s.when != "forward" for s in wanted)
    of_weights = any(s.when == "weights" for s in wanted)
    trainable = {p for p in model.parameters() if p.requires_grad}
    handles, tokens, micro = [], 1, MicroBatch(sys.maxsize)
    model.requires_grad_(False)
    for observer in observers:
        observer.layer.module.flexmoe_observer = observer
        for name, parameter in observer.layer.parameters.items() if of_weights else ():
            parameter.requires_grad_(True)

            def collect(p: nn.Parameter, observer: Observer = observer, name: str = name) -> None:
                observer.add_weights(name, p, tokens)

            handles.append(parameter.register_post_accumulate_grad_hook(collect))
    device = next(model.parameters()).device

    def look(ids: Tensor, into: Statistics) -> None:
        nonlocal tokens
        tokens = ids[:, 1:].numel()
        for observer in observers:
            observer.stats = into[observer.layer.index]
            observer.stats.to(device)
        ids = ids.to(device)
        before = [dict(observer.stats.values) for observer in observers]

        def run(size: int) -> None:
            for observer, values in zip(observers, before, strict=True):  # as before a failed try
                observer.stats.values = {name: value.clone() for name, value in values.items()}
            for part in ids.split(size):
                loss = token_loss(model(input_ids=part, use_cache=False).logits, part)
                if not torch.isfinite(loss):
                    raise FlexmoeError(
                        "the model's loss on the calibration data is not finite: check that the "
                        "tokenizer belongs to the model, or run in float32"
                    )
                if backward:
                    loss.backward()

        if of_weights or is_sharded(model):  # gradients of a batch, or calls made by all together
            run(len(ids))
        else:
            micro.run(run, len(ids))
        for observer in observers:
            observer.stats.tokens += ids.numel()
            observer.stats.batches += 1

    try:
        with experts_function(model, "flexmoe_observe"), torch.set_grad_enabled(backward):
            yield look
    finally:
        for handle in handles:
            handle.remove()
        for observer in observers:
            del observer.layer.module.flexmoe_observer
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)


def observe(
    model: nn.Module,
    ids: Tensor,
    names: Sequence[str],
    *,
    batch_size: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> Statistics:
    """One pass over windows ``ids`` [n, t] that fills the named statistics."""
    wanted = find_statistics(names)
    found = empty_statistics(expert_layers(model), wanted, seed)
    with watched(model, wanted) as look:
        for batch in track(ids.split(batch_size), "observe"):
            look(batch, found)
    for stats in found.values():
        stats.to("cpu")
    return found


def thin_experts(statistics: Statistics, at_least: int = THIN) -> dict[int, list[int]]:
    """Experts that saw fewer than ``at_least`` tokens, by layer: their ranking is a guess."""
    return {
        i: experts
        for i, stats in statistics.items()
        if (experts := (stats["count_E"] < at_least).nonzero().flatten().tolist())
    }
