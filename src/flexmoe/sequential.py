"""Scores layer after layer, each seeing its predecessors already pruned: the order of work of
CAMERA-P, of NAEE's progressive form and others. What a layer is given is then what the pruned model
will give it, with the router rule that it will have.

The scores fit the share they were made at. A pass for each layer, which stops behind it; two where
a method compares with what the layer gives in the unpruned model.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flexmoe.around import around_experts
from flexmoe.errors import FlexmoeError
from flexmoe.experts import (
    Enough,
    ExpertLayer,
    Routing,
    expert_layers,
    experts_function,
    observe_forward,
    unchanged,
)
from flexmoe.methods import Method, score_layers
from flexmoe.observe import Observer
from flexmoe.progress import Track, silent
from flexmoe.routing.edits import Work, edited_forward
from flexmoe.routing.rules import reroute, restore
from flexmoe.statistics import Statistics, empty_statistics, passes
from flexmoe.training import processes


def check_sequential(method: Method, pruned: float) -> None:
    """`FlexmoeError` unless ``method`` can be scored layer after layer at the share ``pruned``."""
    if not 0 < pruned < 1:
        raise FlexmoeError(f"sequential must lie between 0 and 1, found {pruned:g}: 0.4 is 40 %")
    if method.cost != "forward" or method.passes > 1:
        raise FlexmoeError(
            f"sequential has no meaning for method '{method.name}' ({method.cost}): it is for "
            "methods that take one forward pass, such as camera"
        )
    if processes()[1] > 1:
        raise FlexmoeError("sequential works in one process only")


def score_sequential(
    model: nn.Module,
    ids: Tensor,
    method: Method,
    pruned: float,
    *,
    router: str = "keep",
    batch_size: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> tuple[dict[int, Tensor], Statistics]:
    """Scores of every layer on windows ``ids`` [n, t] with the weakest share ``pruned`` of channels
    (or experts) of every layer before it gone, and the statistics they come from. ``router`` is
    ``keep``, or ``remove`` for experts."""
    layers = expert_layers(model)
    (wanted,) = passes(method.needs)
    targets = any("target" in s.reads for s in wanted)
    batches = ids.to(next(model.parameters()).device).split(batch_size)
    found: dict[int, Tensor] = {}
    statistics: Statistics = {}
    width = {layer.index: torch.full((layer.E,), layer.I) for layer in layers}
    try:
        for layer in layers:
            layer.module.flexmoe_observer = unchanged
        for layer in track(layers, "observe"):
            # of the unpruned model, by batch
            target = [_run_to(model, layer, batch) for batch in batches] if targets else None
            if router == "remove":
                reroute(model, router, width, {})
            observer = layer.module.flexmoe_observer = Observer(layer, wanted)
            observer.stats = empty_statistics([layer], wanted, seed)[layer.index]
            observer.stats.to(batches[0].device)
            with experts_function(model, SEQUENTIAL), around_experts([layer], wanted) as around:
                observer.around = around[layer.index]
                for n, batch in enumerate(batches):
                    observer.around.target_TH = None if target is None else target[n]
                    _run_to(model, layer, batch)
                    observer.stats.tokens += batch.numel()
                    observer.stats.batches += 1
            observer.stats.to("cpu")
            statistics[layer.index] = observer.stats
            found |= score_layers(method, [layer], statistics)
            goes = found[layer.index].flatten().argsort(stable=True)
            goes = goes[: int(pruned * len(goes))]
            if router == "remove":
                restore(model)
                width[layer.index][goes] = 0
                layer.module.flexmoe_width_E = width[layer.index].tolist()
                layer.module.flexmoe_work = Work(layer.I)
                del layer.module.flexmoe_observer
            else:
                layer.module.flexmoe_observer = _Silenced(found[layer.index], goes, layer.I)
    finally:
        restore(model)
        for layer in layers:
            for name in ("flexmoe_observer", "flexmoe_width_E", "flexmoe_work"):
                layer.module.__dict__.pop(name, None)
    return found, statistics


def _run_to(model: nn.Module, layer: ExpertLayer, batch: Tensor) -> Tensor:
    """What the experts of ``layer`` give; nothing behind them is computed."""
    given: list[Tensor] = []

    def enough(module: nn.Module, args: Any, output: Tensor) -> None:
        given.append(output)
        raise Enough

    stop = layer.module.register_forward_hook(enough)
    try:
        with torch.no_grad():
            model(input_ids=batch, use_cache=False)
    except Enough:
        pass
    finally:
        stop.remove()
    return given[0]


class _Silenced:
    """Sets activations of the channels, or experts, that go to zero."""

    def __init__(self, score: Tensor, goes: Tensor, channels: int):
        keep = torch.ones(score.numel())
        keep[goes] = 0
        self.keep_EI = keep.view(len(score), -1).expand(-1, channels)

    def __call__(self, routing: Routing, h_SI: Tensor) -> Tensor:
        return h_SI * self.keep_EI.to(h_SI)[routing.expert_S]


def _forward(module: nn.Module, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Registered as ``flexmoe_sequential``: a layer that is observed or silenced, or one that its
    router has forgotten experts of."""
    observed = "flexmoe_observer" in module.__dict__
    return (observe_forward if observed else edited_forward)(module, x_TH, index_TK, weight_TK)


SEQUENTIAL = "flexmoe_sequential"
ALL_EXPERTS_FUNCTIONS.register(SEQUENTIAL, _forward)
