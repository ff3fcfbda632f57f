"""Scores layer after layer, each seeing its predecessors already pruned: the order of work of
CAMERA-P and others. What a layer is given is then what the pruned model will give it.

The scores fit the share they were made at. A pass for each layer, which stops behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.around import around_experts
from flexmoe.errors import FlexmoeError
from flexmoe.experts import Routing, expert_layers, experts_function
from flexmoe.methods import Method, score_layers
from flexmoe.progress import Track, silent
from flexmoe.statistics import Observer, Statistics, empty_statistics, passes
from flexmoe.training import processes


class _Enough(Exception):
    """Ends a forward pass behind the layer that is looked at."""


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
    batch_size: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> tuple[dict[int, Tensor], Statistics]:
    """Scores of every layer on windows ``ids`` [n, t] with the weakest share ``pruned`` of channels
    (or experts) of every layer before it silenced, and the statistics they come from."""
    layers = expert_layers(model)
    (wanted,) = passes(method.needs)
    device = next(model.parameters()).device
    found: dict[int, Tensor] = {}
    statistics: Statistics = {}

    def enough(module: nn.Module, args: Any, output: Any) -> None:
        raise _Enough

    try:
        for layer in layers:
            layer.module.flexmoe_observer = _untouched
        with experts_function(model, "flexmoe_observe"), torch.no_grad():
            for layer in track(layers, "observe"):
                observer = layer.module.flexmoe_observer = Observer(layer, wanted)
                observer.stats = empty_statistics([layer], wanted, seed)[layer.index]
                observer.stats.to(device)
                stop = layer.module.register_forward_hook(enough)
                with around_experts([layer], wanted) as around:
                    observer.around = around[layer.index]
                    for batch in ids.split(batch_size):
                        try:
                            model(input_ids=batch.to(device), use_cache=False)
                        except _Enough:
                            pass
                        observer.stats.tokens += batch.numel()
                        observer.stats.batches += 1
                stop.remove()
                observer.stats.to("cpu")
                statistics[layer.index] = observer.stats
                found |= score_layers(method, [layer], statistics)
                layer.module.flexmoe_observer = _Silenced(found[layer.index], pruned, layer.I)
    finally:
        for layer in layers:
            del layer.module.flexmoe_observer
    return found, statistics


def _untouched(routing: Routing, h_SI: Tensor) -> Tensor:
    return h_SI


class _Silenced:
    """Sets activations of the weakest share of a layer's channels, or experts, to zero."""

    def __init__(self, score: Tensor, pruned: float, channels: int):
        goes = score.flatten().argsort(stable=True)[: int(pruned * score.numel())]
        keep = torch.ones(score.numel())
        keep[goes] = 0
        self.keep_EI = keep.view(len(score), -1).expand(-1, channels)

    def __call__(self, routing: Routing, h_SI: Tensor) -> Tensor:
        return h_SI * self.keep_EI.to(h_SI)[routing.expert_S]
