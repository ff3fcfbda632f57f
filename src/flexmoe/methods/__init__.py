"""Methods: one file per published way to score channels, one decorated pure function in each.

A method maps the statistics of one layer to a score of its channels [E, I] or of its experts [E],
higher = keep. A file of your own works without touching the package: ``--method ./mine.py:score``.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import ExpertLayer
from flexmoe.statistics import LayerStatistics, find_statistics, passes

Score = Callable[[ExpertLayer, LayerStatistics], Tensor]


UNITS = ("channel", "expert")


@dataclass(frozen=True)
class Method:
    """A scoring method: its ``score`` function, the statistics it ``needs``, the ``unit`` it scores
    (channel [E, I] or expert [E]), where it was published, how it ``allocate``s by default (as its
    paper does, or as near as an allocator comes), and whether it compares with a second checkpoint,
    whose routers are ``stats["reference_router_EH"]``."""

    name: str
    paper: str
    needs: tuple[str, ...]
    score: Score
    unit: str = "channel"
    allocate: str = "learned"
    reference: bool = False

    @property
    def summary(self) -> str:
        """First line of the score function's docstring."""
        return (self.score.__doc__ or "").strip().split("\n")[0]

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration text."""
        return bool(self.needs)

    @property
    def passes(self) -> int:
        """How often it goes through the calibration text."""
        return len(passes(self.needs)) if self.needs_data else 0

    @property
    def cost(self) -> str:
        """What a pass takes: forward; backward as well; or the gradients of the weights too. Those
        without data look at one checkpoint or two."""
        when = {s.when for s in find_statistics(self.needs)}
        if "weights" in when:
            return "weight gradients"
        if "backward" in when:
            return "backward"
        if when:
            return "forward"
        return "two checkpoints" if self.reference else "no data"


METHODS: dict[str, Method] = {}


def method(
    name: str,
    *,
    paper: str,
    needs: tuple[str, ...] = (),
    unit: str = "channel",
    allocate: str | None = None,
    reference: bool = False,
) -> Callable[[Score], Score]:
    """Declare a scoring method; see any file in this folder. ``allocate`` defaults to ``learned``
    for channels and ``layer`` for experts."""
    if unit not in UNITS:
        raise did_you_mean(unit, UNITS, "unit")
    rule = allocate or {"channel": "learned", "expert": "layer"}[unit]

    def register(score: Score) -> Score:
        METHODS[name] = Method(name, paper, needs, score, unit, rule, reference)
        return score

    return register


def all_methods() -> dict[str, Method]:
    """Every method that comes with flexmoe, by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return METHODS


def find_method(name: str) -> Method:
    """A method by its name, or from a file as ``path/to/file.py:function``."""
    path, colon, function = name.rpartition(":")
    if not (colon and path.endswith(".py")):
        known = all_methods()
        if name.endswith(".py"):
            raise FlexmoeError(f"'{name}' names a file but no function: write {name}:score")
        if name not in known:
            raise did_you_mean(name, known, "method")
        return known[name]
    if not Path(path).is_file():
        raise FlexmoeError(f"method file '{path}' does not exist")
    all_methods()  # a file of yours may use the statistics that come with flexmoe
    module_name = f"flexmoe_method_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise FlexmoeError(f"'{path}', line {error.lineno}: {error.msg}") from error
    found = getattr(module, function, None)
    for candidate in METHODS.values():
        if found is not None and candidate.score is found:
            return candidate
    raise FlexmoeError(
        f"'{path}' has no method function '{function}': decorate it with "
        '@flexmoe.method("name", paper="...", needs=(...))'
    )


def score_layers(
    method: Method, layers: list[ExpertLayer], statistics: Mapping[int, LayerStatistics]
) -> dict[int, Tensor]:
    """Scores float64 of every layer, [E, I] or [E] by the method's unit, checked: shape, finite."""
    scores = {}
    for layer in layers:
        with torch.no_grad():
            score = method.score(layer, statistics[layer.index]).double().cpu()
        expected = (layer.E, layer.I) if method.unit == "channel" else (layer.E,)
        if score.shape != expected:
            axes = "experts, channels" if method.unit == "channel" else 'experts, unit="expert"'
            raise FlexmoeError(
                f"method '{method.name}' gave shape {list(score.shape)} for layer {layer.index}, "
                f"expected {list(expected)} ({axes})"
            )
        if not torch.isfinite(score).all():
            raise FlexmoeError(
                f"method '{method.name}' gave values that are not finite for layer {layer.index}: "
                "divide by counts with .clamp_min(1)"
            )
        scores[layer.index] = score
    return scores
