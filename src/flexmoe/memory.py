"""Memory: what this process holds, what a piece of work takes, and smaller pieces when it is out."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")

log = logging.getLogger("flexmoe")


def held(device: torch.device) -> int:
    """Bytes in use: of the whole process, libraries included, or of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def most_held(device: torch.device) -> int:
    """The largest that `held` has ever been."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # what Linux counts in


class Allocated(TorchDispatchMode):
    """Counts the bytes of tensors that are made inside the block: ``peak`` is the most that lived
    at a time. Views count once; what kernels use inside of them is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        place, size = storage._cdata, storage.nbytes()
        if place in self.known:
            return
        self.known.add(place)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, place, size)

    def _forget(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.now -= size


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is about memory, of this machine or of a GPU."""
    said = str(error).lower()
    return isinstance(error, MemoryError | RuntimeError) and (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in said
        or "allocate memory" in said
    )


def fitting(run: Callable[[int], Result], size: int) -> tuple[Result, int]:
    """``run(size)``, again with half the size whenever memory runs out; returns what it gave and
    the size that did. ``run`` must be able to start over."""
    while True:
        try:
            return run(size), size
        except (MemoryError, RuntimeError) as error:
            if size == 1 or not out_of_memory(error):
                raise
        size //= 2  # outside the except block: what the failed try held is free now
        log.warning("out of memory: going on with %d windows at a time", size)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
