"""Back end of plain torch operations: a loop over experts. The reference, the fallback, and the one
with gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.kernels.routing import Routing

if TYPE_CHECKING:
    from flexmoe.kernels.interface import Weights


class Prefix(NamedTuple):
    """The first w channels of an expert: ``up`` is [gate, up] (or [up]), each [w, H], ``bias``
    theirs [w] or None, ``down_wH`` a row for each channel."""

    up: Sequence[Tensor]
    bias: Sequence[Tensor | None]
    down_wH: Tensor


def experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    weights: Weights,
    width_BE: Tensor,
    token_budget_T: Tensor | None = None,
    budget: int = 0,
) -> Tensor:
    """See `flexmoe.kernels.interface.experts`."""
    routing, table = sort(index_TK, weight_TK, width_BE, token_budget_T, budget)
    prefix = prefixes(weights)
    y_SH = outputs(x_TH[routing.token_S], routing, table, prefix, weights.activate)
    if weights.down_bias_EH is not None:
        y_SH = y_SH + weights.down_bias_EH[routing.expert_S]
    if weights.norm is not None:
        y_SH = weights.norm(y_SH)
    return routing.combine(y_SH, x_TH, index_TK.shape[1])


def sort(
    index_TK: Tensor,
    weight_TK: Tensor,
    width_BE: Tensor,
    token_budget_T: Tensor | None,
    budget: int,
) -> tuple[Routing, list[list[int]]]:
    """The routed pairs by expert and budget, and the widths at the budgets these are numbers of."""
    table = width_BE.tolist()
    if token_budget_T is None:
        table = [table[budget]]
    else:
        token_budget_T = token_budget_T[: index_TK.shape[0]]
    return Routing.of(index_TK, weight_TK, len(table[0]), token_budget_T, len(table)), table


def outputs(
    x_SH: Tensor,
    routing: Routing,
    width_BE: Sequence[Sequence[int]],
    prefix: Callable[[int, int], Prefix],
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """What the down projections give for every routed pair [S, H], without bias and routing
    weight; ``prefix(e, w)`` is what the storage has of an expert."""
    y = []
    for (e, _, _), b, x_nH in zip(
        routing.segments, routing.budgets, routing.split(x_SH), strict=True
    ):
        if (w := width_BE[b][e]) > 0:
            up, bias, down_wH = prefix(e, w)
            y.append(activations(x_nH.to(down_wH.dtype), up, bias, activate) @ down_wH)
        else:
            y.append(torch.zeros_like(x_nH))
    return torch.cat(y) if y else x_SH


def activations(
    x_nH: Tensor,
    up: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    """Activations [n, w] of the channels in ``up``, see `Prefix`."""
    sides = [F.linear(x_nH, weight, b) for weight, b in zip(up, bias, strict=True)]
    return activate(torch.cat(sides, -1) if len(sides) > 1 else sides[0])


def prefixes(weights: Weights) -> Callable[[int, int], Prefix]:
    """How to get at the channels of an expert. Split, not sliced, for the gradient."""

    def experts_of(tensor: Tensor) -> tuple[Tensor, ...]:
        if weights.offset_E is None:
            return tensor.unbind(0)
        return tensor.split(weights.offset_E.diff().tolist())

    up_E, down_E = experts_of(weights.up), experts_of(weights.down)
    up_by_E, down_by_E = (
        None if scale is None else experts_of(scale)
        for scale in (weights.up_scale, weights.down_scale)
    )
    bias_E = None if weights.up_bias is None else experts_of(weights.up_bias)

    def prefix(e: int, w: int) -> Prefix:
        up, down_wH = up_E[e][:w], down_E[e][:w]
        if up_by_E is not None:
            up = up.float() * up_by_E[e][:w, :, None]
        if down_by_E is not None:
            down_wH = down_wH.float() * down_by_E[e][:w, None]
        up = up.unbind(1)
        bias = [None] * len(up) if bias_E is None else bias_E[e][:w].unbind(1)
        return Prefix(up, bias, down_wH)

    return prefix
