"""Counts what operations on tensors take: bytes alive, products, bytes written."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# What the C library of Linux asks the system for is given back when it is freed; smaller pieces
# come from its heap, which is in use up to one and a half times what lives there (bench/doctor.py).
MAPPED = 32 * 2**20
HEAP = 1.5


@dataclass(frozen=True)
class Cost:
    """``peak``: bytes taken at most beside weights and gradients. ``operations``: of matrix
    products, two for a multiplication and its addition. ``moved``: bytes written by all
    operations."""

    peak: int = 0
    operations: float = 0.0
    moved: float = 0.0

    def times(self, steps: float) -> Cost:
        """The same step several times in a row: no more memory."""
        return Cost(self.peak, steps * self.operations, steps * self.moved)

    def then(self, other: Cost) -> Cost:
        """This, and the other one after it."""
        return Cost(
            max(self.peak, other.peak),
            self.operations + other.operations,
            self.moved + other.moved,
        )


class Meter(TorchDispatchMode):
    """Counts what goes by: bytes alive by their storages, operations, bytes written."""

    def __init__(self, known: Sequence[Tensor], heap: bool):
        super().__init__()
        self.heap = heap
        self.live = self.peak = 0
        self.operations = self.moved = 0.0
        self.seen = {id(t.untyped_storage()): t.untyped_storage() for t in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if (count := flop_registry.get(func.overloadpacket)) is not None:
            self.operations += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor.untyped_storage())
        return out

    def _see(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self.seen:
            return
        self.seen[key] = weakref.ref(storage)
        self.moved += size
        taken = round(HEAP * size) if self.heap and size < MAPPED else size
        self.live += taken
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, taken)

    def _gone(self, key: int, taken: int) -> None:
        self.live -= taken
        del self.seen[key]
