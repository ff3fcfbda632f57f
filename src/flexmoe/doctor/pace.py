"""How fast this machine's processor is, measured for a moment with numpy: `glance` has no torch."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

MOMENT = 0.02  # seconds each rate is measured for
ROWS, WIDEST = 256, 2048  # sizes of the product: larger ones are as fast and take seconds
# Where other work keeps the cores, the threads of a product wait for each other longer than they
# compute. Some products are over before anything comes between, and the smallest has one thread.
SHAPES = ((64, 64, 64), (128, 512, 512))
COPIES = 3  # moments for the copy, which is short enough for one of them to go through


def pace(hidden: int, channels: int) -> tuple[float, float]:
    """Operations a second of a float32 product of about the shape of an expert, or of a smaller one
    that is faster, and bytes a second of a copy of 32 MB: the most that was seen."""
    shapes = (*SHAPES, (ROWS, min(hidden, WIDEST), min(channels, WIDEST)))
    source = np.ones(2**23, np.float32)
    target = np.empty_like(source)
    copy = min(min(repeated(lambda: np.copyto(target, source))) for _ in range(COPIES))
    return max(_product(*shape) for shape in shapes), source.nbytes / copy


def _product(rows: int, hidden: int, channels: int) -> float:
    a, b = np.ones((rows, hidden), np.float32), np.ones((hidden, channels), np.float32)
    out = np.empty((rows, channels), np.float32)
    return 2 * a.size * channels / min(repeated(lambda: np.matmul(a, b, out=out)))


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
