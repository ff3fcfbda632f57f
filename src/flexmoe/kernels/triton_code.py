"""Back end for GPUs: two grouped matrix products in Triton, widths read on the device.

Nothing here waits for the device or depends on what is in its tensors: the launch shapes follow
from the number of tokens, experts, budgets and the largest expert stored, so a call can be captured
in a CUDA graph once, and widths and budgets of tokens changed in place afterwards.

Every (expert, budget) is a group of its own with one width. Pairs are sorted by group and cut into
blocks that never cross one; tiles beyond the width of their group end at once, and the second
product runs over as many channels as its group has.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from flexmoe.kernels.interface import Weights


class Tiles(NamedTuple):
    """Sizes of tiles: pairs, columns of the result, steps of the sum. Chosen, not tuned: no GPU
    was at hand."""

    M: int
    N: int
    K: int


def tiles(pairs: int, groups: int) -> Tiles:
    """Small blocks of pairs where groups have few: a block is computed whole."""
    each = pairs / groups
    return Tiles(16, 64, 64) if each <= 16 else Tiles(64, 64, 32)


class Blocks(NamedTuple):
    """Pairs sorted by group, cut into blocks. ``group_N`` is the number of groups for blocks that
    are not needed; ``end_G`` the end of every group in ``position_S``."""

    position_S: Tensor
    group_N: Tensor
    start_N: Tensor
    end_G: Tensor


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
    (T, K), (B, E), H = index_TK.shape, width_BE.shape, x_TH.shape[1]
    S, C, I = T * K, weights.up_RCH.shape[1], weights.largest
    size = tiles(S, min(S, E * B))
    blocks = _blocks(index_TK, token_budget_T, budget, B, E, size.M)
    x_TH = x_TH.to(weights.up_RCH.dtype).contiguous()
    h_SI = x_TH.new_empty(S, max(I, 1))
    y_SH = torch.zeros(S, H, dtype=torch.float32, device=x_TH.device)
    N = len(blocks.group_N)
    where = (*blocks, width_BE.contiguous(), weights.offset_E, E * B, B, E)
    no_bias = x_TH  # a pointer that is never read
    if N and I:
        _up[(N, triton.cdiv(I, size.N))](
            x_TH,
            weights.up_RCH,
            no_bias if weights.up_bias_RC is None else weights.up_bias_RC,
            h_SI,
            *where,
            K,
            H,
            I,
            C=C,
            BIAS=weights.up_bias_RC is not None,
            ACTIVATION=weights.activation,
            M=size.M,
            N=size.N,
            STEP=size.K,
        )
    if N:
        _down[(N, triton.cdiv(H, size.N))](
            h_SI,
            weights.down_RH,
            no_bias if weights.down_bias_EH is None else weights.down_bias_EH,
            weight_TK.reshape(-1).float(),
            y_SH,
            *where,
            H,
            h_SI.shape[1],
            BIAS=weights.down_bias_EH is not None,
            M=size.M,
            N=size.N,
            STEP=size.K,
        )
    return y_SH.view(T, K, H).sum(1).to(x_TH.dtype)


def _blocks(
    index_TK: Tensor, token_budget_T: Tensor | None, budget: int, B: int, E: int, M: int
) -> Blocks:
    T, K = index_TK.shape
    S, G = T * K, E * B
    expert_S = index_TK.reshape(-1).long()
    if token_budget_T is None:
        group_S = expert_S * B + budget
    else:
        group_S = expert_S * B + token_budget_T[:T].long().repeat_interleave(K, output_size=S)
    group_S = torch.where((expert_S >= 0) & (expert_S < E), group_S, G)  # held elsewhere: last
    group_S, position_S = torch.sort(group_S, stable=True)
    count_G = torch.zeros(G + 1, dtype=torch.long, device=index_TK.device)
    count_G.scatter_add_(0, group_S, torch.ones_like(group_S))
    end_G = count_G.cumsum(0)[:G]
    blocks_G = (count_G[:G] + M - 1) // M
    last_G = blocks_G.cumsum(0)
    # each group that has pairs adds at most one block that is not full
    block_N = torch.arange(S // M + min(S, G), device=index_TK.device)
    group_N = torch.searchsorted(last_G, block_N, right=True)
    inside = group_N.clamp(max=G - 1)
    before_N = last_G[inside] - blocks_G[inside]
    start_N = (end_G - count_G[:G])[inside] + (block_N - before_N) * M
    return Blocks(position_S, group_N, start_N, end_G)


@triton.jit
def _activate(x, NAME: tl.constexpr):
    if NAME == "silu":
        return x / (1.0 + tl.exp(-x))
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # (1 + tanh(z)) / 2 is the logistic function of 2z
        return x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    else:
        positive = tl.maximum(x, 0.0)
        return positive * positive


@triton.jit
def _up(
    x_ptr,
    up_ptr,
    bias_ptr,
    h_ptr,
    position_ptr,
    group_ptr,
    start_ptr,
    end_ptr,
    width_ptr,
    offset_ptr,
    groups,
    B,
    E,
    K,
    H,
    I,
    C: tl.constexpr,
    BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
):
    """Activations of M pairs and N channels of one group."""
    block = tl.program_id(0)
    group = tl.load(group_ptr + block)
    if group >= groups:
        return
    expert = group // B
    width = tl.load(width_ptr + (group % B) * E + expert)
    first = tl.program_id(1) * N
    if first >= width:
        return
    row = tl.load(start_ptr + block) + tl.arange(0, M)
    has_row = row < tl.load(end_ptr + group)
    token = tl.load(position_ptr + row, mask=has_row, other=0) // K
    channel = first + tl.arange(0, N)
    has_channel = channel < width
    stored = (tl.load(offset_ptr + expert) + channel).to(tl.int64) * C
    step = tl.arange(0, STEP)
    gate = tl.full((M, N), 0.0, tl.float32)
    up = tl.full((M, N), 0.0, tl.float32)
    for k in range(0, H, STEP):
        has_step = k + step < H
        x = tl.load(
            x_ptr + token[:, None] * H + (k + step)[None, :],
            mask=has_row[:, None] & has_step[None, :],
            other=0.0,
        )
        at = up_ptr + stored[None, :] * H + (k + step)[:, None]
        mask = has_step[:, None] & has_channel[None, :]
        gate = tl.dot(x, tl.load(at, mask=mask, other=0.0), gate, input_precision="ieee")
        if C == 2:
            up = tl.dot(x, tl.load(at + H, mask=mask, other=0.0), up, input_precision="ieee")
    if BIAS:
        bias = tl.load(bias_ptr + stored, mask=has_channel, other=0.0)
        gate += bias.to(tl.float32)[None, :]
        if C == 2:
            up += tl.load(bias_ptr + stored + 1, mask=has_channel, other=0.0).to(tl.float32)[
                None, :
            ]
    h = _activate(gate, ACTIVATION)
    if C == 2:
        h *= up
    tl.store(
        h_ptr + row[:, None].to(tl.int64) * I + channel[None, :],
        h.to(h_ptr.dtype.element_ty),
        mask=has_row[:, None] & has_channel[None, :],
    )


@triton.jit
def _down(
    h_ptr,
    down_ptr,
    bias_ptr,
    weight_ptr,
    y_ptr,
    position_ptr,
    group_ptr,
    start_ptr,
    end_ptr,
    width_ptr,
    offset_ptr,
    groups,
    B,
    E,
    H,
    I,
    BIAS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
):
    """N columns of the weighted outputs of M pairs of one group, each to the pair's own place."""
    block = tl.program_id(0)
    group = tl.load(group_ptr + block)
    if group >= groups:
        return
    expert = group // B
    width = tl.load(width_ptr + (group % B) * E + expert)
    row = tl.load(start_ptr + block) + tl.arange(0, M)
    has_row = row < tl.load(end_ptr + group)
    pair = tl.load(position_ptr + row, mask=has_row, other=0)
    column = tl.program_id(1) * N + tl.arange(0, N)
    has_column = column < H
    stored = tl.load(offset_ptr + expert).to(tl.int64)
    step = tl.arange(0, STEP)
    y = tl.full((M, N), 0.0, tl.float32)
    for k in range(0, width, STEP):
        has_step = k + step < width
        h = tl.load(
            h_ptr + row[:, None].to(tl.int64) * I + (k + step)[None, :],
            mask=has_row[:, None] & has_step[None, :],
            other=0.0,
        )
        down = tl.load(
            down_ptr + (stored + k + step)[:, None] * H + column[None, :],
            mask=has_step[:, None] & has_column[None, :],
            other=0.0,
        )
        y = tl.dot(h, down, y, input_precision="ieee")
    if BIAS:
        bias = tl.load(bias_ptr + expert * H + column, mask=has_column, other=0.0)
        y += bias.to(tl.float32)[None, :]
    y *= tl.load(weight_ptr + pair, mask=has_row, other=0.0)[:, None]
    tl.store(
        y_ptr + pair[:, None] * H + column[None, :], y, mask=has_row[:, None] & has_column[None, :]
    )
