"""The pass over calibration text that fills statistics: one observer on every layer's experts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor, nn

from flexmoe.around import Around, Pairs, around_experts
from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, Routing, Seen, expert_layers, experts_function
from flexmoe.memory import MicroBatch
from flexmoe.progress import Track, silent
from flexmoe.sharding import is_sharded
from flexmoe.statistics import (
    LayerStatistics,
    Statistic,
    Statistics,
    beside,
    empty_statistics,
    goes_backward,
    passes,
    token_loss,
)


class Observer:
    """Sits on one experts module during the pass and adds up in ``stats``, which stand where the
    module is. ``earlier`` are the layer's statistics of the passes before this one, ``around``
    follows what stands around the experts, where a statistic reads it."""

    stats: LayerStatistics

    def __init__(
        self,
        layer: ExpertLayer,
        wanted: Sequence[Statistic],
        earlier: LayerStatistics | None = None,
        around: Around | None = None,
    ):
        self.layer, self.wanted, self.earlier, self.around = layer, wanted, earlier, around

    def __call__(self, routing: Routing, h_SI: Tensor) -> Tensor:
        weight_S = routing.weight_S.detach()
        backward = [s for s in self.wanted if s.when == "backward"]
        if backward and torch.is_grad_enabled():
            if not h_SI.requires_grad:  # first MoE layer of a frozen model: the graph starts here
                h_SI = h_SI.requires_grad_()
            kept = h_SI.detach()
            h_SI.register_hook(
                lambda grad: self._add(backward, routing, Pairs(weight_S, kept, grad))
            )
        return h_SI

    @torch.no_grad()
    def see(self, seen: Seen) -> None:
        """Everything that went by in one call: statistics of the forward pass."""
        pairs = Pairs(seen.routing.weight_S, seen.h_SI, None, self.layer, seen, self.around)
        self._add([s for s in self.wanted if s.when == "forward"], seen.routing, pairs)
        for s in self.wanted:
            if s.when == "batch":
                value, into = self._value(s, pairs).double(), self.stats[s.name]
                into.copy_(torch.maximum(into, value) if s.merge == "max" else into + value)
        if self.around is not None:
            self.around.clear()

    def _value(self, s: Statistic, pairs: Pairs) -> Tensor:
        return s.function(pairs, self.earlier) if s.after else s.function(pairs)

    def _add(self, wanted: Sequence[Statistic], routing: Routing, pairs: Pairs) -> None:
        for s in wanted:
            value = self._value(s, pairs)
            exact = torch.float64 if value.dtype == torch.float64 else torch.float32
            into = self.stats[s.name]
            for e, a, b in routing.segments:
                if s.merge == "max":
                    into[e] = torch.maximum(into[e], value[a:b].amax(0))
                else:
                    into[e] += value[a:b].sum(0, dtype=exact)

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


Look = Callable[[Tensor, Statistics], None]


@contextmanager
def watched(
    model: nn.Module,
    wanted: Sequence[Statistic],
    earlier: Mapping[int, LayerStatistics] = MappingProxyType({}),
) -> Iterator[Look]:
    """Inside the block ``look(ids, into)`` runs the model on windows ``ids`` [n, t] and adds what
    its experts do to the statistics ``into``, which move to the model's device. ``earlier`` are
    those of the passes before this one.

    Forward only when nothing asks for gradients. All weights are frozen but those a ``weights``
    statistic needs, so the backward pass is cheaper than a plain one. The loss is the sum over
    tokens: a token counts the same in any batch. Where memory runs out a batch goes in parts,
    except for ``weights`` statistics, which look at the gradient of the whole batch, and those that
    are ``whole``.
    """
    layers = expert_layers(model)
    observers = [Observer(layer, wanted, earlier.get(layer.index)) for layer in layers]
    backward = goes_backward(wanted)
    of_weights = any(s.when == "weights" for s in wanted)
    in_one = of_weights or any(s.whole for s in wanted)
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

        if in_one or is_sharded(model):  # a batch as it is, or calls made by all together
            run(len(ids))
        else:
            micro.run(run, len(ids))
        for observer in observers:
            observer.stats.tokens += ids.numel()
            observer.stats.batches += 1

    try:
        with (
            around_experts(layers, wanted) as around,
            experts_function(model, "flexmoe_observe"),
            torch.set_grad_enabled(backward),
        ):
            for observer in observers:
                observer.around = around[observer.layer.index]
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
    """One pass over windows ``ids`` [n, t] that fills the named statistics (more only where one
    comes after another)."""
    found: Statistics = {}
    for wanted in passes(names):
        part = empty_statistics(expert_layers(model), wanted, seed)
        with watched(model, wanted, found) as look:
            for batch in track(ids.split(batch_size), "observe"):
                look(batch, part)
        for stats in part.values():
            stats.to("cpu")
        found = beside(found, part)
    return found
