"""Memory: what is held and free, the most that work holds, and smaller pieces when it is out."""

from __future__ import annotations

import ctypes
import logging
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TypeVar

import psutil
import torch

from flexmoe.ram import free_ram

Result = TypeVar("Result")

EVERY = 0.005  # seconds between two looks at what the process holds
PROCESS = psutil.Process()
log = logging.getLogger("flexmoe")


def held(device: torch.device) -> int:
    """Bytes in use: of this whole process, libraries included, or of its tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return PROCESS.memory_info().rss


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_ram()


def gib(size: float) -> str:
    """Bytes as people give them: 1.25 GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def give_back() -> None:
    """Free memory goes back to the system. The C library of Linux keeps it for itself otherwise,
    and what is kept adds up over layers."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class MostHeld:
    """``bytes`` is the most that `held` was inside the block."""

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0

    def __enter__(self) -> MostHeld:
        self.bytes = held(self.device)
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.ended.wait(EVERY):
            self.bytes = max(self.bytes, held(self.device))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self.device)
        else:
            self.ended.set()
            self.thread.join()


def out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory has run out, of this machine or of a GPU."""
    said = str(error).lower()
    return (
        isinstance(error, MemoryError | torch.OutOfMemoryError)
        or "out of memory" in said
        or "allocate memory" in said
    )


class MicroBatch:
    """How many windows go at a time: ``size``, halved for good whenever memory runs out."""

    def __init__(self, size: int):
        self.size = size

    def run(self, work: Callable[[int], Result], most: int) -> Result:
        """``work(size)`` with a size of at most ``most``, again with half of it when memory runs
        out: it must be able to start over."""
        while True:
            size = min(self.size, most)
            try:
                return work(size)
            except (MemoryError, RuntimeError) as error:
                if size == 1 or not out_of_memory(error):
                    raise
            # outside the except block: what the failed try held is free by now
            self.size = size // 2
            log.warning("out of memory: going on with %d windows at a time", self.size)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
