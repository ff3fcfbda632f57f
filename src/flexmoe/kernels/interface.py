"""The signature all back ends share, and the storage they read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from flexmoe.kernels import torch_loop


@dataclass(frozen=True)
class Weights:
    """The experts of one layer, channel-major: a channel is a row, the channels of an expert are
    consecutive rows, best first, so any prefix of any expert is one contiguous slice. ``R`` rows
    are stored in all.

    ``up_RCH`` [R, C, H]: gate and up of each channel (C = 2), or up alone (C = 1, no gate);
    ``down_RH`` [R, H]; ``offset_E`` int32 [E + 1], first row of each expert and R at the end: the
    rows between two offsets are what is in memory, and no width may pass them.
    ``up_bias_RC`` and ``down_bias_EH`` where the architecture has them; the down bias is of an
    expert, not of a channel, and is added at every width, 0 too.
    ``activate`` maps gate and up side by side [n, 2w] (or up alone [n, w]) to activations [n, w];
    ``activation`` is its name for compiled back ends, "" if only `activate` can say what it does.
    """

    up_RCH: Tensor
    down_RH: Tensor
    offset_E: Tensor
    activate: Callable[[Tensor], Tensor]
    activation: str = ""
    up_bias_RC: Tensor | None = None
    down_bias_EH: Tensor | None = None


def experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    weights: Weights,
    width_BE: Tensor,
    token_budget_T: Tensor | None = None,
    budget: int = 0,
) -> Tensor:
    """What the routed experts add to every token [T, H].

    Token t goes through its experts ``index_TK[t]``, each cut to the first
    ``width_BE[token_budget_T[t], e]`` of its channels, and their outputs are added up with
    ``weight_TK[t]``. Without ``token_budget_T`` (int32) all tokens are at ``budget``. Indices
    outside 0..E-1 are experts held elsewhere and contribute nothing.
    """
    return torch_loop.experts(x_TH, index_TK, weight_TK, weights, width_BE, token_budget_T, budget)
