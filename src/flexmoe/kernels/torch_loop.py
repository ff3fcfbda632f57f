"""Back end of plain torch operations: a loop over experts. The reference, and the fallback."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from flexmoe.kernels.interface import Weights


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
    (T, K), (B, E) = index_TK.shape, width_BE.shape
    offset_E, width = weights.offset_E.tolist(), width_BE.tolist()
    # pairs are sorted by (expert, budget): every group has one width
    expert_S = index_TK.reshape(-1).long()
    expert_S = torch.where((expert_S < 0) | (expert_S >= E), E, expert_S)
    if token_budget_T is None:
        budget_S = torch.full_like(expert_S, budget)
    else:
        budget_S = token_budget_T[:T].long().repeat_interleave(K)
    key_S, position_S = torch.sort(expert_S * B + budget_S, stable=True)
    count = torch.bincount(key_S, minlength=E * B)[: E * B].tolist()
    pairs_SH = x_TH.new_zeros(T * K, x_TH.shape[1])
    start = 0
    for key, n in enumerate(count):
        if not n:
            continue
        e, b = divmod(key, B)
        at_n = position_S[start : start + n]
        start += n
        y_nH = _output(weights, x_TH[at_n // K], offset_E[e], width[b][e], e)
        if y_nH is not None:
            pairs_SH[at_n] = y_nH
    out_TH = (pairs_SH.view(T, K, -1).float() * weight_TK[..., None].float()).sum(1)
    return out_TH.to(x_TH.dtype)


def _output(weights: Weights, x_nH: Tensor, row: int, w: int, e: int) -> Tensor | None:
    """Outputs of expert ``e`` cut to ``w`` channels, from row ``row`` on; None for nothing."""
    bias_H = None if weights.down_bias_EH is None else weights.down_bias_EH[e]
    if not w:
        return None if bias_H is None else bias_H.expand_as(x_nH)
    up_wCH = weights.up_RCH[row : row + w]
    bias_wC = None if weights.up_bias_RC is None else weights.up_bias_RC[row : row + w]
    sides = [
        F.linear(x_nH, up_wCH[:, c], None if bias_wC is None else bias_wC[:, c])
        for c in range(up_wCH.shape[1])
    ]
    y_nH = weights.activate(torch.cat(sides, -1)) @ weights.down_RH[row : row + w]
    return y_nH if bias_H is None else y_nH + bias_H
