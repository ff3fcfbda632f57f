"""Experts that behave alike, grouped step by step: who is absorbed first can go first.

Papers cluster for one target. Here one tree of merges serves all targets, so that what is kept for
a smaller model is part of what is kept for a larger one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STAYS = 1e9  # the score of the last expert of a layer: a layer never loses its last group

Better = Callable[[list[int], int, int], bool]


def absorbed(distance_EE: Tensor, linkage: str, better: Better) -> Tensor:
    """The distance [E] at which every expert is absorbed by another one, never falling over merges.

    ``linkage`` between groups: ``complete`` (largest distance of two members) or ``average``.
    ``better(members, a, b)`` says whether ``a`` represents the merged group better than ``b``, the
    representatives of the two groups.
    """
    E = len(distance_EE)
    between = distance_EE.double().clone()
    between.fill_diagonal_(torch.inf)
    members, stands_for = [[e] for e in range(E)], list(range(E))
    score_E, height = torch.full((E,), STAYS, dtype=torch.float64), 0.0
    for _ in range(E - 1):
        at = int(between.argmin())
        a, b = min(at // E, at % E), max(at // E, at % E)
        height = max(height, float(between[a, b]))
        if linkage == "complete":
            joined = torch.maximum(between[a], between[b])
        else:
            n, m = len(members[a]), len(members[b])
            joined = (n * between[a] + m * between[b]) / (n + m)
        members[a] = members[a] + members[b]
        first, second = stands_for[a], stands_for[b]
        stays, goes = (first, second) if better(members[a], first, second) else (second, first)
        stands_for[a], score_E[goes] = stays, height
        joined[a] = torch.inf
        between[a], between[:, a] = joined, joined
        between[b], between[:, b] = torch.inf, torch.inf
    return score_E
