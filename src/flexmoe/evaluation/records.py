"""The records of ``evaluation.json``, what one evaluation of a family measured.

What is new since the first ones may be absent (None): older files are read as they are.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, field_validator

from flexmoe.evaluation.intervals import Interval
from flexmoe.files import Strict


class _Record(Strict):
    model_config = ConfigDict(allow_inf_nan=False)


# --- what it was measured on -------------------------------------------------------------------


class OfWeights(_Record):
    """What a curve was measured on. ``plan_sha256``: of flexmoe.safetensors. ``weights_sha256``:
    of the family's weights, see `of_weights`; for a plan alone what its recipe says of them."""

    plan_sha256: str
    weights_sha256: str


class TextFile(_Record):
    """One data file: its windows, tokens a window, and the sha256 of the very tokens."""

    windows: int
    seq_len: int
    sha256: str


class PairsFile(_Record):
    """The pairs file: name and sha256, and how many of each paradigm were used (None: all)."""

    name: str
    sha256: str
    per_paradigm: int | None


class Prompts(_Record):
    """What answers were generated from. ``name`` and ``sha256`` of the file, or 'data' and None:
    the beginnings of held-out windows; ``n`` prompts; ``max_new_tokens``; by mode the
    ``settings`` of generation and the ``seed`` of sampling."""

    name: str
    sha256: str | None
    n: int
    max_new_tokens: int
    settings: dict[str, dict[str, Any]]
    seed: int


class TaskList(_Record):
    """Tasks of lm-evaluation-harness as they were asked for (of files the name), the first
    ``limit`` documents of each (None: all), sha256 of the task files by name."""

    names: list[str]
    limit: int | None
    files: dict[str, str]


# --- what was measured -------------------------------------------------------------------------


class FilePoint(_Record):
    """One data file at one budget, see `flexmoe.evaluation.losses.loss_rows`."""

    nll: float
    nll_interval: Interval | None
    increase: float | None = None
    increase_interval: Interval | None = None
    kept: float | None = None
    kept_interval: Interval | None = None
    kl: float | None = None
    kl_interval: Interval | None = None
    agreement: float | None = None
    agreement_interval: Interval | None = None


class PairsPoint(_Record):
    """Minimal pairs at one budget, see `flexmoe.evaluation.pairs.pair_rows`."""

    n: int
    accuracy: float
    interval: Interval | None
    fields: dict[str, float]
    ratio: float | None
    ratio_interval: Interval | None
    margin_ratio: float | None
    margin_ratio_interval: Interval | None


class TaskPoint(_Record):
    """One task or group of tasks at one budget, see `flexmoe.evaluation.tasks.task_rows`."""

    metric: str
    value: float
    interval: Interval | None
    n: int
    metrics: dict[str, float]
    ratio: float | None
    ratio_interval: Interval | None


class Share(_Record):
    """A share of ``n`` answers and its interval."""

    n: int
    share: float
    interval: Interval


class HealthPoint(_Record):
    """Generation at one budget in one mode, see `flexmoe.evaluation.health.health_row`."""

    looped: Share
    endless: Share
    either: Share
    tokens: float
    examples: list[dict[str, str]]


class StructuredPoint(_Record):
    """JSON and tool calls at one budget, see `flexmoe.evaluation.structured.structured_row`."""

    valid: Share
    text: Share | None
    tools: Share | None


class Measurements(_Record):
    """All that is measured of one member but what needs a base. ``generation`` is by mode:
    greedy, sampled."""

    nll: float
    nll_interval: Interval | None = None
    files: dict[str, float]
    by_file: dict[str, FilePoint] | None = None
    pairs: PairsPoint | None
    tasks: dict[str, TaskPoint] | None = None
    generation: dict[str, HealthPoint] | None = None
    structured: StructuredPoint | None = None


class Point(Measurements):
    """One budget: the figures of a `flexmoe.plan.Member`, its `Measurements`, and its distance to
    the base, see `flexmoe.evaluation.losses.loss_rows`."""

    pruned: float
    achieved: float
    routed_parameters: int
    active_parameters: int
    bytes: int
    increase: float
    increase_interval: Interval | None
    kept: float
    kept_interval: Interval | None
    kl: float | None = None
    kl_interval: Interval | None = None
    agreement: float | None = None
    agreement_interval: Interval | None = None


class Reference(Measurements):
    """Another model that the budgets were compared with in the same run: what it was asked for
    as, and its size."""

    model: str
    routed_parameters: int
    bytes: int


class Curve(_Record):
    """``evaluation.json``: what was measured, on what, when, and a `Point` a budget, rich to poor.
    ``against`` is the base of all comparisons where that is not budget 0."""

    format: int
    date: str
    of: OfWeights
    command: str | None = None
    data: str
    files: dict[str, TextFile]
    pairs: PairsFile | None
    tasks: TaskList | None = None
    generation: Prompts | None = None
    structured: Prompts | None = None
    hardware: str
    dtype: str
    versions: dict[str, str]
    against: Reference | None = None
    budgets: list[Point]

    @property
    def base(self) -> str:
        """What all comparisons are with, for people."""
        return "the full model" if self.against is None else self.against.model

    def increases(self, point: Point) -> dict[str, float]:
        """Of the loss on each data file over the base."""
        base = self.against or self.budgets[0]
        return {name: loss - base.files[name] for name, loss in point.files.items()}

    @field_validator("budgets")
    @classmethod
    def _rich_to_poor(cls, budgets: list[Point]) -> list[Point]:
        """Curves were once saved in the order that was asked for."""
        return sorted(budgets, key=lambda point: point.pruned)
