"""How published methods share a budget out among layers and experts, beside a plain cut.

Each function says for every block when it goes (lowest first), so that all budgets are cuts of one
sequence, nested and exact, where the papers make one plan for one budget.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from flexmoe.allocate import Blocks

MIDDLE, STEEPNESS = 0.3, 1.0  # SEAP's xi_0 and kappa
# TENP names the share of full experts at 40 % ("20-30 %") and 70 % pruned; between them on lines
FULL_AT = ((0.0, 1.0), (0.4, 0.25), (0.7, 0.05), (1.0, 0.0))
SLOPE = 0.5  # the deepest layer has half as many full experts more than the mean, the first less


def _layers(blocks: Blocks) -> Iterator[tuple[float, int, Tensor]]:
    """Depth from 0 to 1, number of experts and blocks [X] of every layer."""
    for n, (i, shape) in enumerate(blocks.layers.items()):
        depth = n / max(1, len(blocks.layers) - 1)
        yield depth, shape.experts, blocks.layer_X == i


def by_layer(blocks: Blocks, score_X: Tensor) -> Tensor:
    """The share of its layer that is gone once the block and all weaker ones are cut [X]."""
    sequence_X = blocks.sequence(score_X, score_X)
    gone_X = torch.empty_like(score_X)
    for _, _, here_X in _layers(blocks):
        here = sequence_X[here_X[sequence_X]]
        parameters = blocks.parameters_X[here].double()
        gone_X[here] = parameters.cumsum(0) / parameters.sum()
    return gone_X


def logistic(blocks: Blocks, score_X: Tensor) -> Tensor:
    """SEAP (arXiv 2503.07605): the share that layers lose follows a logistic curve over depth, deep
    ones lose more; the curve's height is what a budget sets. The paper leaves the first and last
    two layers whole and counts the others alone; here all take part, as budgets are of all."""
    gone_X = by_layer(blocks, score_X)
    for depth, _, here_X in _layers(blocks):
        gone_X[here_X] *= 1 + np.exp(-STEEPNESS * (depth - MIDDLE))
    return gone_X


def trapezoid(blocks: Blocks, score_X: Tensor) -> Tensor:
    """TENP (arXiv 2606.09885): important experts stay whole, more of them in deep layers, and the
    others are slimmed to one width. How many stay whole is interpolated between what the paper says
    of two budgets, and their slope over depth is a choice of ours: it gives no formula.

    An expert is as important as the sum of its channels' scores.
    """
    share, full = np.array(FULL_AT).T
    pruned = np.linspace(1e-6, 1 - 1e-6, 1001)
    full_then = np.interp(pruned, share, full)
    slim = (1 - pruned - full_then) / (1 - full_then)  # one width that makes up the budget
    time_X = torch.empty_like(score_X)
    for depth, E, here_X in _layers(blocks):
        worth_E = (score_X * blocks.size_X)[here_X].view(E, -1).sum(1)
        rank_E = worth_E.argsort(descending=True, stable=True).argsort()
        among_E = (rank_E + 0.5) / E / (1 + SLOPE * (2 * depth - 1))
        slimmed_E = np.interp(among_E, full[::-1], share[::-1])
        start_N = blocks.place_X[here_X].view(E, -1)[0] * blocks.quantum
        channels = blocks.size_X[here_X].view(E, -1)[0].sum()
        narrow_N = np.interp(start_N / channels, slim[::-1], pruned[::-1], right=0.0)
        time_X[here_X] = torch.from_numpy(np.maximum(slimmed_E[:, None], narrow_N)).flatten()
    return time_X


def coverage(blocks: Blocks, score_X: Tensor) -> Tensor:
    """MoE-Slimming (arXiv 2606.18304): a layer keeps the fewest channels whose scores come to a
    share of its total, larger for layers with a large total; among its experts they are shared out
    in the same way. Totals of layers are smoothed: their root, within a deviation of the mean.

    Scores of an expert add up to its weight in the layer, those of a layer to the layer's weight.
    """
    value_X = score_X.clamp_min(0) * blocks.size_X
    total_L = torch.stack([value_X[here_X].sum() for _, _, here_X in _layers(blocks)]).sqrt()
    spread = total_L.std(correction=0)
    total_L = total_L.clamp(total_L.mean() - spread, total_L.mean() + spread)
    total_L = total_L / total_L.mean().clamp_min(1e-30)
    time_X = torch.empty_like(score_X)
    for (_, E, here_X), weight in zip(_layers(blocks), total_L.tolist(), strict=True):
        value_EN = value_X[here_X].view(E, -1)
        # how much of its expert is covered without a block, over the expert's weight
        before_EN = value_EN.cumsum(1) - value_EN
        weight_E1 = value_EN.sum(1, keepdim=True)
        place_EN = before_EN / weight_E1.square().clamp_min(1e-30)
        place_EN = place_EN.masked_fill(weight_E1 <= 0, torch.inf)  # goes before all others
        staying = place_EN.flatten().argsort(stable=True)
        best = value_EN.flatten().sort(descending=True).values
        covered = (best.cumsum(0) - best) / best.sum().clamp_min(1e-30)
        here_X = here_X.nonzero()[:, 0]
        time_X[here_X[staying]] = -covered / max(weight, 1e-30)
    return time_X
