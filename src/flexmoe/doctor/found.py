"""What doctor finds, as plain data: what a checkpoint is, what jobs need, what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import flexmoe
from flexmoe.errors import FlexmoeError
from flexmoe.widths import BUDGETS, default_quantum, nearest_width

Result = TypeVar("Result")

TENSOR_PARALLEL = (2, 4, 8)
FP8_BLOCK, K_QUANT = 128, 256


@dataclass(frozen=True)
class Layer:
    """One MoE layer. ``flags``: those of its layout that are set."""

    index: int
    experts: int
    channels: int
    hidden: int
    activation: str
    flags: tuple[str, ...]
    shared_parameters: int


@dataclass(frozen=True)
class Width:
    """An expert width and what it divides into: ``tensor_parallel`` the sizes that split it into
    even shards; whole FP8 blocks of 128; whole K-quant rows of 256."""

    pruned: float
    width: int
    tensor_parallel: tuple[int, ...]
    fp8_blocks: bool
    k_quants: bool


@dataclass(frozen=True)
class Need:
    """``memory``: bytes at the peak, ``parts`` what they are of. ``disk``: bytes of the tensors
    written; ``scratch``: what lies beside them at most until the job is done. ``seconds``: None
    where the architecture's forward pass cannot be tried without data, ``memory`` is without
    activations then; and of `glance` on a GPU."""

    job: str
    memory: int
    parts: dict[str, int]
    disk: int
    scratch: int = 0
    seconds: float | None = None


@dataclass
class Diagnosis:
    """What was found. ``problems`` are all reasons why `compress` would fail, ``warnings`` what
    may go wrong. ``exports``: why a layout cannot be written ("" if it can)."""

    model: str
    device: str = ""
    model_type: str = ""
    architecture: str = ""
    dtype: str = ""
    layers: list[Layer] = field(default_factory=list)
    experts_per_token: int | None = None
    parameters: dict[str, int] = field(default_factory=dict)
    widths: list[Width] = field(default_factory=list)
    exports: dict[str, str] = field(default_factory=dict)
    needs: list[Need] = field(default_factory=list)
    memory_free: int = 0
    disk_free: int = 0
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def attempt(self, check: Callable[[], Result]) -> Result | None:
        """What ``check`` gives; if it refuses, its reason is noted."""
        try:
            return check()
        except FlexmoeError as error:
            if str(error) not in self.problems:
                self.problems.append(str(error))
            return None

    def same_as(self, other: Diagnosis) -> bool:
        """Whether both say the same of what the checkpoint is."""
        names = (
            "model_type", "architecture", "dtype", "layers", "experts_per_token", "parameters",
            "widths", "exports",
        )  # fmt: skip
        return all(getattr(self, name) == getattr(other, name) for name in names)


def widths(narrowest: int, quantum: int | None = None) -> list[Width]:
    """The widths of the whole model and of every budget, for experts of ``narrowest`` channels."""
    quantum, found = quantum or default_quantum(narrowest), []
    for share in (0.0, *BUDGETS):
        width = narrowest if not share else nearest_width(narrowest, quantum, share)
        parts = tuple(n for n in TENSOR_PARALLEL if width % n == 0)
        found.append(Width(share, width, parts, width % FP8_BLOCK == 0, width % K_QUANT == 0))
    return found


def report(found: Diagnosis) -> dict[str, Any]:
    """Everything as JSON, with the version that said so."""
    return {"flexmoe": flexmoe.__version__, **asdict(found)}
