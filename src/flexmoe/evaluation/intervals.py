"""Intervals: how far a mean over evaluation items would move with other items of the same kind.

The bootstrap: draw items with replacement, take the mean, again and again. Every budget is
evaluated on the same items, so all are resampled by the same draws: what makes an item hard for
all of them cancels in differences and ratios (a paired interval).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Interval = tuple[float, float]

DRAWS = 4000
LEVEL = 0.95
Z = 1.959963984540054  # standard normal: 95 % lie within
CHUNK = 4_000_000  # drawn items held at once


def resampled_means(
    strata: Sequence[Array],
    weights: Sequence[float] | None = None,
    *,
    seed: int | Sequence[int] = 0,
    draws: int = DRAWS,
) -> Array:
    """Means [draws, B] of resampled items.

    ``strata`` are groups of items [n, B], a column a budget, drawn from group by group;
    ``weights`` the groups' shares in the mean (default: by their number of items). Of n items
    n - 1 are drawn, which makes the variance of the means unbiased in small groups too (Rao and
    Wu, 1988, Resampling inference with complex survey data). A group of one item says nothing
    about its spread: the means are NaN then.
    """
    sizes = [len(values_NB) for values_NB in strata]
    if weights is None:
        weights = [n / sum(sizes) for n in sizes]
    means_RB = np.zeros((draws, strata[0].shape[1]))
    if min(sizes) < 2:
        return np.full_like(means_RB, np.nan)
    random = np.random.default_rng(seed)
    for values_NB, weight, n in zip(strata, weights, sizes, strict=True):
        step = max(1, CHUNK // n)
        for start in range(0, draws, step):
            rows = min(step, draws - start)
            drawn = random.integers(n, size=(rows, n - 1)) + n * np.arange(rows)[:, None]
            count_RN = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n)
            means_RB[start : start + rows] += weight / (n - 1) * (count_RN @ values_NB)
    return means_RB


def interval(values_R: Array) -> Interval | None:
    """The middle 95 % of resampled values; None where they say nothing (not finite)."""
    tail = (1 - LEVEL) / 2
    # an order statistic: nothing is interpolated towards an infinite neighbour
    low, high = np.quantile(values_R, [tail, 1 - tail], method="inverted_cdf")
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None


def share_interval(hits: int, n: int) -> Interval:
    """The 95 % interval of a share, ``hits`` of ``n`` (Wilson, 1927, Probable inference, the law
    of succession, and statistical inference): unlike resampling it does not take 0 of 20 for
    certain."""
    z2 = Z * Z
    middle = (hits + z2 / 2) / (n + z2)
    half = Z / (n + z2) * math.sqrt(hits * (n - hits) / n + z2 / 4)
    return max(0.0, middle - half), min(1.0, middle + half)
