"""How fast this machine's processor is, measured for a moment with numpy: `glance` has no torch."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

MOMENT = 0.02  # seconds each rate is measured for
ROWS, WIDEST = 256, 2048  # sizes of the product: larger ones are as fast and take seconds


def pace(hidden: int, channels: int) -> tuple[float, float]:
    """Operations a second of a float32 product of about the shape of an expert, bytes a second of a
    copy of 32 MB: the most that was seen."""
    hidden, channels = min(hidden, WIDEST), min(channels, WIDEST)
    a, b = np.ones((ROWS, hidden), np.float32), np.ones((hidden, channels), np.float32)
    out, source = np.empty((ROWS, channels), np.float32), np.ones(2**23, np.float32)
    target = np.empty_like(source)
    product = min(repeated(lambda: np.matmul(a, b, out=out)))
    copy = min(repeated(lambda: np.copyto(target, source)))
    return 2 * a.size * channels / product, source.nbytes / copy


def repeated(work: Callable[[], object], moment: float = MOMENT) -> list[float]:
    """Seconds of each of the calls that a moment has room for, after one that does not count."""

    def timed() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    timed()
    calls, end = [timed()], time.perf_counter() + moment
    while time.perf_counter() < end:
        calls.append(timed())
    return calls
