"""From scores to widths for all budgets.

Every allocator says one thing: in which order the blocks (a quantum of channels each) of all
experts go. A budget is then a cut of that one sequence, so widths are nested by construction and
hit every pruned share to one quantum.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.experts import LayerShape
from flexmoe.shares import by_layer, coverage, logistic, trapezoid

if TYPE_CHECKING:
    from flexmoe.plan import Plan

Score = Mapping[int, Tensor]  # decoder layer -> [E, I], higher = keep


def order_of(score_EI: Tensor) -> Tensor:
    """Channels of every expert, best first, int32 [E, I]. The sort is stable: channels without
    evidence (equal scores) keep their places."""
    return score_EI.sort(dim=1, descending=True, stable=True).indices.int()


class Blocks:
    """All blocks of all experts as flat vectors over X = sum of E * N, one entry a block."""

    def __init__(self, layers: Mapping[int, LayerShape], quantum: int):
        self.layers, self.quantum = dict(layers), quantum
        layer, expert, place, size, parameters = [], [], [], [], []
        for i, shape in self.layers.items():
            start = torch.arange(0, shape.channels, quantum)
            N, E = len(start), shape.experts
            layer.append(torch.full((E * N,), i))
            expert.append(torch.arange(E).repeat_interleave(N))
            place.append(torch.arange(N).repeat(E))
            size.append((shape.channels - start).clamp_max(quantum).repeat(E))
            parameters.append(size[-1] * shape.channel_parameters)
        self.layer_X, self.expert_X = torch.cat(layer), torch.cat(expert)
        self.place_X, self.size_X = torch.cat(place), torch.cat(size)
        self.parameters_X = torch.cat(parameters)
        self.total = sum(shape.parameters for shape in self.layers.values())

    def scores(self, score: Score) -> Tensor:
        """Mean score of each block's channels in rank order, never rising within an expert [X]."""
        parts = []
        for i, shape in self.layers.items():
            ranked = score[i].double().sort(dim=1, descending=True).values
            pad = -shape.channels % self.quantum
            size_N = self.size_X[self.layer_X == i][: (shape.channels + pad) // self.quantum]
            blocks = torch.nn.functional.pad(ranked, (0, pad)).unflatten(1, (-1, self.quantum))
            parts.append((blocks.sum(2) / size_N).cummin(1).values.flatten())
        return torch.cat(parts)

    def sequence(self, primary_X: Tensor, secondary_X: Tensor) -> Tensor:
        """Blocks in the order they go: lowest primary value first, ties by the secondary one,
        then tail first."""
        sequence = self.place_X.argsort(descending=True, stable=True)
        for key_X in (secondary_X, primary_X):
            sequence = sequence[key_X[sequence].argsort(stable=True)]
        return sequence

    def cut(
        self,
        sequence_X: Tensor,
        budgets: Sequence[float],
        least: int = 0,
        most: int | None = None,
    ) -> dict[int, Tensor]:
        """Widths int32 [B, E] of every layer when the head of the sequence is cut off, as near to
        each pruned share as a block allows; at ``least`` and at ``most`` so many blocks."""
        removed_X = self.parameters_X[sequence_X].cumsum(0)
        step_X = torch.cat([torch.zeros(1, dtype=removed_X.dtype), removed_X]).double()
        if budgets and max(budgets) * self.total > float(step_X[-1]) + 0.5:
            raise FlexmoeError(
                f"cannot prune {max(budgets):g}: at most {float(step_X[-1]) / self.total:.4f} of "
                "the routed-expert parameters belong to channels"
            )
        width = {}
        rank_X = torch.empty_like(sequence_X)
        rank_X[sequence_X] = torch.arange(len(sequence_X))
        most = len(sequence_X) if most is None else most
        count_B = [int((step_X - share * self.total).abs().argmin()) for share in budgets]
        count_B = [min(max(count, least), most) for count in count_B]
        for i, shape in self.layers.items():
            here = self.layer_X == i
            rank_EN = rank_X[here].view(shape.experts, -1)
            size_EN = self.size_X[here].view(shape.experts, -1)
            rows = [(size_EN * (rank_EN >= count)).sum(1) for count in count_B]
            width[i] = torch.stack(rows).int()
        return width


def allocate(
    name: str,
    layers: Mapping[int, LayerShape],
    score: Score,
    budgets: Sequence[float],
    quantum: int,
) -> dict[int, Tensor]:
    """Widths int32 [B, E] of every layer by one of the score-based allocators.

    ``uniform``: every expert the same share; ``layer``: every layer the same share, the best
    blocks of the layer stay; ``global``: the best blocks of the model stay; the others see
    `shares`.
    """
    if name not in PRIMARY:
        raise FlexmoeError(f"'{name}' does not follow from scores alone")
    blocks = Blocks(layers, quantum)
    score_X = blocks.scores(score)
    return blocks.cut(blocks.sequence(PRIMARY[name](blocks, score_X), score_X), budgets)


def _uniform(blocks: Blocks, score_X: Tensor) -> Tensor:
    primary_X = torch.empty_like(score_X)
    for i in blocks.layers:
        here = blocks.layer_X == i
        place_X = blocks.place_X[here].double()
        primary_X[here] = -place_X / (place_X.max() + 1)
    return primary_X


# by allocator: from blocks and their scores [X] to when each goes, lowest first
PRIMARY: dict[str, Callable[[Blocks, Tensor], Tensor]] = {
    "uniform": _uniform,
    "layer": by_layer,
    "global": lambda blocks, score_X: score_X,
    "logistic": logistic,
    "trapezoid": trapezoid,
    "coverage": coverage,
}


def allocate_experts(
    name: str,
    layers: Mapping[int, LayerShape],
    score: Score,
    budgets: Sequence[float],
    groups: int = 1,
    per_token: Mapping[int, int] = MappingProxyType({}),
) -> dict[int, Tensor]:
    """Widths int32 [B, E] of every layer where experts, scored [E], stay or go as a whole.

    ``layer``: every layer loses the same share of its experts, as near as their number allows,
    which is what most papers do; ``global``: the best experts of the model stay, and of every layer
    as many as a token is sent to (``per_token``) as long as there are others, the best one longest.
    Of several ``groups`` of neighbours every one loses equally many (by ``layer`` only).
    """
    if name == "global":
        whole = max(shape.channels for shape in layers.values())
        both = torch.cat([score[i] for i in layers])
        above = float(both.max() - both.min()) + 1
        score = {i: score[i].clone() for i in layers}
        for i, number in per_token.items():
            score[i][score[i].topk(number).indices] += above
            score[i][score[i].argmax()] += above  # a router must choose one
        spread = {i: score[i][:, None].expand(-1, shape.channels) for i, shape in layers.items()}
        return allocate("global", layers, spread, budgets, whole)
    if name != "layer":
        raise FlexmoeError(f"whole experts are removed by layer or global, not by '{name}'")
    width = {}
    for i, shape in layers.items():
        in_group = score[i].view(groups, -1).argsort(dim=1, stable=True).argsort(dim=1)
        place_E = in_group.flatten() * groups
        one = groups * shape.channels * shape.channel_parameters  # what removed experts save
        gone_B = torch.tensor([groups * round(s * shape.parameters / one) for s in budgets])
        if int(gone_B.max()) > shape.experts:
            reach = shape.experts * one / groups / shape.parameters
            raise FlexmoeError(
                f"cannot prune {max(budgets):g}: at most {reach:.4f} of the routed-expert "
                f"parameters of layer {i} belong to channels"
            )
        width[i] = (shape.channels * (place_E >= gone_B[:, None])).int()
    return width


def widths_from_path(
    layers: Mapping[int, LayerShape],
    score: Score,
    path: Sequence[tuple[float, Mapping[int, Tensor]]],
    budgets: Sequence[float],
    quantum: int,
) -> dict[int, Tensor]:
    """Exact, nested widths from a learned path of (pruned share, widths [E] of every layer).

    A block goes at the first share of the path at which its expert was narrower than the block:
    an expert that grew again later does not get it back (running minimum). Blocks that went at
    the same share, or never, go by score.
    """
    blocks = Blocks(layers, quantum)
    gone_X = torch.full((len(blocks.layer_X),), 2.0, dtype=torch.float64)
    for share, width in sorted(path, key=lambda point: point[0], reverse=True):
        for i in layers:
            here = blocks.layer_X == i
            kept_X = width[i][blocks.expert_X[here]]
            lost_X = blocks.place_X[here] * quantum >= kept_X
            gone_X[here] = torch.where(lost_X, share, gone_X[here])
    return blocks.cut(blocks.sequence(gone_X, blocks.scores(score)), budgets)


def cut_between(plan: Plan, richer: int, poorer: int, pruned: float) -> dict[int, Tensor]:
    """Widths [E] of every layer at a share between two budgets of a plan: every expert gives up
    its blocks between the two at the same pace."""
    shapes = {i: layer.shape for i, layer in plan.layers.items()}
    blocks = Blocks(shapes, plan.quantum)
    primary_X = torch.empty(len(blocks.layer_X), dtype=torch.float64)
    for i in shapes:
        here = blocks.layer_X == i
        start_X = blocks.place_X[here] * plan.quantum
        rich_X = plan.width[i][richer][blocks.expert_X[here]]
        poor_X = plan.width[i][poorer][blocks.expert_X[here]]
        pace_X = (rich_X - start_X) / (rich_X - poor_X).clamp_min(1)
        pace_X = torch.where(start_X >= rich_X, -1.0, pace_X)  # gone already
        primary_X[here] = torch.where(start_X < poor_X, 2.0, pace_X).double()  # stays longest
    # no budget is hit exactly where blocks are large: the cut stays between those of the two
    gone, staying = int((primary_X == -1).sum()), int((primary_X == 2).sum())
    width = blocks.cut(
        blocks.sequence(primary_X, primary_X), [pruned], gone, len(primary_X) - staying
    )
    return {i: w[0] for i, w in width.items()}
