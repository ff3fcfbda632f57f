"""Methods: one file per published way to score channels, one decorated pure function in each.

A method maps the statistics of one layer to a score of its channels [E, I] or of its experts [E],
higher = keep. A few learn their scores on the text instead, those of all layers together. A file
of your own works without touching the package: ``--method ./mine.py:score``.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import ExpertLayer, expert_layers
from flexmoe.progress import Track, silent
from flexmoe.statistics import LayerStatistics, find_statistics, passes, refuse_taken

Score = Callable[[ExpertLayer, LayerStatistics], Tensor]


@dataclass(frozen=True)
class Text:
    """What a method learns on: windows ``ids`` [n, t], how many to take at a time, a seed."""

    ids: Tensor
    batch_size: int = 8
    seed: int = 0
    track: Track = silent


Learn = Callable[[nn.Module, Text], dict[int, Tensor]]

Function = TypeVar("Function", bound=Callable[..., Any])
UNITS = ("channel", "expert")


@dataclass(frozen=True)
class Method:
    """A scoring method: its ``score`` function (a `Learn` where it ``learns``), the statistics it
    ``needs``, the ``unit`` it scores (channel [E, I] or expert [E]), where it was published, how it
    ``allocate``s by default (as its paper does, or as near as an allocator comes), what its paper
    does with the ``router`` (see `routing.rules`), and whether it compares with a second
    checkpoint, whose routers are ``stats["reference_router_EH"]``. ``sha256`` is of the file that
    it was read from, "" of those that come with flexmoe."""

    name: str
    paper: str
    needs: tuple[str, ...]
    score: Callable[..., Any]
    unit: str = "channel"
    allocate: str = "learned"
    reference: bool = False
    router: str = "keep"
    learns: bool = False
    sha256: str = ""

    @property
    def summary(self) -> str:
        """First line of the score function's docstring."""
        return (self.score.__doc__ or "").strip().split("\n")[0]

    @property
    def needs_data(self) -> bool:
        """Whether it looks at calibration text."""
        return bool(self.needs) or self.learns

    @property
    def passes(self) -> int:
        """How often it goes through the calibration text (where it learns: at least)."""
        return len(passes(self.needs)) if self.needs_data else 0

    @property
    def cost(self) -> str:
        """What a pass takes: forward; backward as well; the gradients of the weights too; or many
        of them, training. Those without data look at one checkpoint or two."""
        if self.learns:
            return "training"
        when = {s.when for s in find_statistics(self.needs)}
        if "weights" in when:
            return "weight gradients"
        if "backward" in when:
            return "backward"
        if when:
            return "forward"
        return "two checkpoints" if self.reference else "no data"


METHODS: dict[str, Method] = {}
FROM_FILES: dict[tuple[Path, str], Method] = {}  # by file and function, see `find_method`


def method(
    name: str,
    *,
    paper: str,
    needs: tuple[str, ...] = (),
    unit: str = "channel",
    allocate: str | None = None,
    reference: bool = False,
    router: str = "keep",
    learns: bool = False,
) -> Callable[[Function], Function]:
    """Declare a scoring method; see any file in this folder. ``allocate`` defaults to ``learned``
    for channels and ``layer`` for experts; a ``router`` rule other than ``keep`` is of experts.
    With ``learns`` the function is a `Learn`, and needs no statistics."""
    if unit not in UNITS:
        raise did_you_mean(unit, UNITS, "unit")
    rule = allocate or {"channel": "learned", "expert": "layer"}[unit]

    if learns and (needs or reference):
        raise FlexmoeError(f"method '{name}' learns on the text: it needs no statistics")

    def register(score: Function) -> Function:
        if name in METHODS:
            refuse_taken(f"method '{name}'", METHODS[name].score, score)
        METHODS[name] = Method(name, paper, needs, score, unit, rule, reference, router, learns)
        return score

    return register


def all_methods() -> dict[str, Method]:
    """Every method that comes with flexmoe, by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return METHODS


def find_method(name: str, *, anew: bool = False) -> Method:
    """A method by its name, or from a file as ``path/to/file.py:function``. A file is executed
    when it is first asked for, and ``anew`` where a run begins: it may be edited meanwhile."""
    path, colon, function = name.rpartition(":")
    known = all_methods()  # before a file of yours, which may use what comes with flexmoe
    if not (colon and path.endswith(".py")):
        if name.endswith(".py"):
            raise FlexmoeError(f"'{name}' names a file but no function: write {name}:score")
        if name not in known:
            raise did_you_mean(name, known, "method")
        return known[name]
    key = Path(path).resolve(), function
    if anew or key not in FROM_FILES:
        FROM_FILES[key] = _execute(path, function)
    return FROM_FILES[key]


def _execute(path: str, function: str) -> Method:
    file = Path(path).resolve()
    if not file.is_file():
        raise FlexmoeError(f"method file '{path}' does not exist")
    source = file.read_bytes()
    module = sys.modules[str(file)] = ModuleType(str(file))
    module.__file__ = str(file)
    try:
        exec(compile(source, file, "exec", dont_inherit=True), module.__dict__)
    except SyntaxError as error:
        raise FlexmoeError(f"'{path}', line {error.lineno}: {error.msg}") from error
    except FlexmoeError:
        raise
    except Exception as error:  # of another's file: anything may come
        raise _of_yours(f"'{path}' cannot be imported", path, error) from error
    found = getattr(module, function, None)
    for candidate in METHODS.values():
        if found is not None and candidate.score is found:
            return replace(candidate, sha256=hashlib.sha256(source).hexdigest())
    raise FlexmoeError(
        f"'{path}' has no method function '{function}': decorate it with "
        '@flexmoe.method("name", paper="...", needs=(...))'
    )


def _of_yours(what: str, path: str, error: Exception) -> FlexmoeError:
    """An error in a method's file: what it said, and in which of the file's lines."""
    places = traceback.extract_tb(error.__traceback__)
    lines = [place.lineno for place in places if Path(place.filename) == Path(path).resolve()]
    where = f", line {lines[-1]} of {path}" if lines else ""
    reason = str(error).splitlines()[0] if str(error) else ""
    return FlexmoeError(f"{what}: {type(error).__name__}: {reason}{where}")


def score_layers(
    method: Method, layers: list[ExpertLayer], statistics: Mapping[int, LayerStatistics]
) -> dict[int, Tensor]:
    """Scores float64 of every layer, [E, I] or [E] by the method's unit, checked: shape, finite."""
    return {
        layer.index: _checked(method, layer, score_layer(method, layer, statistics[layer.index]))
        for layer in layers
    }


def score_model(
    method: Method, model: nn.Module, statistics: Mapping[int, LayerStatistics], text: Text
) -> dict[int, Tensor]:
    """`score_layers` of all layers of ``model``; a method that learns does so on ``text``."""
    layers = expert_layers(model)
    if not method.learns:
        return score_layers(method, layers, statistics)
    try:
        found = method.score(model, text)
    except FlexmoeError:
        raise
    except Exception as error:  # of another's function: anything may come
        what = f"method '{method.name}' failed"
        raise _of_yours(what, method.score.__code__.co_filename, error) from error
    if not isinstance(found, Mapping):
        raise FlexmoeError(
            f"method '{method.name}' gave a {type(found).__name__}, expected the scores of every "
            "layer by its index"
        )
    return {
        layer.index: _checked(method, layer, _tensor(method, layer, found.get(layer.index)))
        for layer in layers
    }


def _checked(method: Method, layer: ExpertLayer, score: Tensor) -> Tensor:
    score = score.double().cpu()
    check_shape(method, layer, score.shape)
    if not torch.isfinite(score).all():
        raise FlexmoeError(
            f"method '{method.name}' gave values that are not finite for layer {layer.index}: "
            "divide sums by counts with stats.mean(name)"
        )
    return score


def score_layer(method: Method, layer: ExpertLayer, statistics: LayerStatistics) -> Tensor:
    """What a method gives for one layer; what goes wrong in it as a `FlexmoeError`."""
    try:
        with torch.no_grad():
            score = method.score(layer, statistics)
    except (DataDependentOutputException, DynamicOutputShapeException):
        return torch.empty(shape_of(method, layer))  # a dry run, of a method that looks at values
    except FlexmoeError:
        raise
    except Exception as error:  # of another's function: anything may come
        what = f"method '{method.name}' failed for layer {layer.index}"
        raise _of_yours(what, method.score.__code__.co_filename, error) from error
    return _tensor(method, layer, score)


def _tensor(method: Method, layer: ExpertLayer, score: Any) -> Tensor:
    if not isinstance(score, Tensor):
        raise FlexmoeError(
            f"method '{method.name}' gave a {type(score).__name__} for layer {layer.index}, "
            f"expected a tensor {_expected(method, layer)}"
        )
    return score


def check_shape(method: Method, layer: ExpertLayer, shape: torch.Size) -> None:
    """`FlexmoeError` unless scores have a number for each channel, or expert."""
    if shape != shape_of(method, layer):
        raise FlexmoeError(
            f"method '{method.name}' gave shape {list(shape)} for layer {layer.index}, expected "
            f"{_expected(method, layer)}"
        )


def shape_of(method: Method, layer: ExpertLayer) -> tuple[int, ...]:
    """The shape of a method's scores of a layer."""
    return (layer.E, layer.I) if method.unit == "channel" else (layer.E,)


def _expected(method: Method, layer: ExpertLayer) -> str:
    axes = "experts, channels" if method.unit == "channel" else 'experts, unit="expert"'
    return f"{list(shape_of(method, layer))} ({axes})"
