"""Statistics: named sums over tokens, and the one pass over calibration data that fills them.

A statistic is a decorated function. It returns a number per routed pair (and channel), and the
pass adds them up per expert in float64. All are sums (or maxima), so parts of a pass merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import ExpertLayer, Routing, expert_layers, experts_function
from flexmoe.progress import Track, silent
from flexmoe.sharding import is_sharded
from flexmoe.training import processes, share

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
    experts_per_token: int = 0
    seed: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    def merge(self, other: LayerStatistics) -> None:
        """Add what another part of the pass saw."""
        for name, value in other.values.items():
            largest = name in STATISTICS and STATISTICS[name].merge == "max"
            mine = self.values[name]
            self.values[name] = torch.maximum(mine, value) if largest else mine + value
        self.tokens += other.tokens
        self.batches += other.batches
        self.experts_per_token = max(self.experts_per_token, other.experts_per_token)


Statistics = dict[int, LayerStatistics]


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


@dataclass
class Observer:
    """Sits on one experts module during the pass and adds up its statistics."""

    layer: ExpertLayer
    wanted: Sequence[Statistic]
    stats: LayerStatistics = field(init=False)

    def __post_init__(self) -> None:
        E, I = self.layer.E, self.layer.I
        device = self.layer.module.down_proj.device
        values = {"count_E": torch.zeros(E, dtype=torch.float64, device=device)}
        for s in self.wanted:
            values[s.name] = torch.zeros(E, I, dtype=torch.float64, device=device)
        self.stats = LayerStatistics(values)

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

    def result(self, seed: int) -> LayerStatistics:
        """The layer's statistics after the pass, on the CPU."""
        stats = self.stats
        stats.values = {name: value.cpu() for name, value in stats.values.items()}
        stats.seed = seed
        stats.experts_per_token = round(float(stats["count_E"].sum()) / stats.tokens)
        return stats


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed next-token cross-entropy in float32, nats; ``ids`` [n, t], ``logits`` [n, t, V]."""
    predicted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="sum")


def observe(
    model: nn.Module,
    ids: Tensor,
    names: Sequence[str],
    *,
    batch_size: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> Statistics:
    """One pass over calibration windows ``ids`` [n, t] that fills the named statistics.

    Forward only when nothing asks for gradients. All weights are frozen but those a ``weights``
    statistic needs, so the backward pass is cheaper than a plain one. The loss is the sum over
    tokens: a token counts the same in any batch.
    """
    wanted = find_statistics(names)
    layers = expert_layers(model)
    observers = [Observer(layer, wanted) for layer in layers]
    backward = any(s.when != "forward" for s in wanted)
    of_weights = any(s.when == "weights" for s in wanted)
    trainable = {p for p in model.parameters() if p.requires_grad}
    handles, tokens = [], 1
    model.requires_grad_(False)
    for observer in observers:
        observer.layer.module.flexmoe_observer = observer
        for name, parameter in observer.layer.parameters.items() if of_weights else ():
            parameter.requires_grad_(True)

            def collect(p: nn.Parameter, observer: Observer = observer, name: str = name) -> None:
                observer.add_weights(name, p, tokens)

            handles.append(parameter.register_post_accumulate_grad_hook(collect))
    device = next(model.parameters()).device
    try:
        with experts_function(model, "flexmoe_observe"), torch.set_grad_enabled(backward):
            for batch in track(ids.split(batch_size), "observe"):
                batch = batch.to(device)
                tokens = batch[:, 1:].numel()
                loss = token_loss(model(input_ids=batch, use_cache=False).logits, batch)
                if not torch.isfinite(loss):
                    raise FlexmoeError(
                        "the model's loss on the calibration data is not finite: check that the "
                        "tokenizer belongs to the model, or run in float32"
                    )
                if backward:
                    loss.backward()
                for observer in observers:
                    observer.stats.tokens += batch.numel()
                    observer.stats.batches += 1
    finally:
        for handle in handles:
            handle.remove()
        for observer in observers:
            del observer.layer.module.flexmoe_observer
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)
    return {observer.layer.index: observer.result(seed) for observer in observers}


def observe_shared(
    model: nn.Module,
    ids: Tensor,
    names: Sequence[str],
    *,
    batch_size: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> Statistics:
    """`observe` by all processes together: each looks at its part of the batches, and all get the
    statistics of the whole pass."""
    batches, world = ids.split(batch_size), processes()[1]
    mine = share(batches)
    found = observe(
        model, torch.cat(list(mine)), names, batch_size=batch_size, seed=seed, track=track
    )
    if is_sharded(model) and len(mine) < len(batches[::world]):
        # sharded weights are gathered by all together, so who is out of batches plays along
        observe(model, ids[:1, :2], names)
    if world == 1:
        return found
    parts: list[Statistics] = [{} for _ in range(world)]
    dist.all_gather_object(parts, found)
    for other in parts[1:]:
        for i, stats in other.items():
            parts[0][i].merge(stats)
    return parts[0]


def thin_experts(statistics: Statistics, at_least: int = THIN) -> dict[int, list[int]]:
    """Experts that saw fewer than ``at_least`` tokens, by layer: their ranking is a guess."""
    return {
        i: experts
        for i, stats in statistics.items()
        if (experts := (stats["count_E"] < at_least).nonzero().flatten().tolist())
    }
