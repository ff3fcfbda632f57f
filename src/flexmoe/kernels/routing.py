"""Which token goes through which expert, sorted so that equal work lies together."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Routing:
    """Routed (token, expert) pairs sorted by expert, and by budget within; pairs of experts held
    elsewhere are left out.

    ``segments`` lists (expert, start, stop) of the runs of pairs of one expert and one budget, and
    ``budgets`` the budget of each; an expert without tokens has no segment.
    """

    position_S: Tensor
    expert_S: Tensor
    token_S: Tensor
    weight_S: Tensor
    segments: list[tuple[int, int, int]]
    budgets: list[int] = field(default_factory=list)

    def split(self, rows_S: Tensor) -> tuple[Tensor, ...]:
        """Rows of each segment. Not slices: the gradient of a split is one concatenation, that of
        a slice a full-size zero for every expert."""
        return rows_S.split([b - a for _, a, b in self.segments])

    @classmethod
    def of(
        cls,
        index_TK: Tensor,
        weight_TK: Tensor,
        experts: int,
        token_budget_T: Tensor | None = None,
        budgets: int = 1,
    ) -> Routing:
        """``token_budget_T`` below ``budgets`` says at which budget each token is; else all at 0.
        Indices outside 0..experts-1 are experts held elsewhere."""
        K = index_TK.shape[1]
        key_S = index_TK.reshape(-1).long()
        key_S = torch.where(key_S < 0, experts, key_S)
        if token_budget_T is not None:
            budget_S = token_budget_T.to(key_S).repeat_interleave(K)
            key_S = torch.where(key_S < experts, key_S * budgets + budget_S, experts * budgets)
        key_S, position_S = torch.sort(key_S, stable=True)
        count = torch.bincount(key_S, minlength=experts * budgets)[: experts * budgets].tolist()
        segments, of_budget, start = [], [], 0
        for key, n in enumerate(count):
            if n:
                segments.append((key // budgets, start, start + n))
                of_budget.append(key % budgets)
            start += n
        position_S, expert_S = position_S[:start], key_S[:start] // budgets
        weight_S = weight_TK.reshape(-1)[position_S]
        return cls(position_S, expert_S, position_S // K, weight_S, segments, of_budget)

    def combine(self, y_SH: Tensor, like_TH: Tensor, K: int) -> Tensor:
        """Weigh the experts' outputs and add them up per token, in float32 or better and in a
        fixed order."""
        wide = torch.promote_types(y_SH.dtype, torch.float32)
        weighted = y_SH.to(wide) * self.weight_S[:, None].to(wide)
        T, H = like_TH.shape[0], y_SH.shape[1]
        pairs = weighted.new_zeros(T * K, H).index_copy(0, self.position_S, weighted)
        return pairs.view(T, K, H).sum(1).to(like_TH.dtype)
