"""Device code of the Triton back end. One block of routed pairs is of one expert at one budget, so
it has one width; widths and offsets are read from memory, never compiled in."""

from __future__ import annotations

import triton
import triton.language as tl

# The interpreter runs on the CPU, where there is nothing to tune.
_TILES = (
    [(32, 32, 4, 1)]
    if triton.knobs.runtime.interpret
    else [(64, 64, 4, 3), (64, 128, 4, 3), (128, 32, 4, 3), (128, 64, 4, 4), (128, 64, 8, 3)]
)
CONFIGS = [
    triton.Config({"BLOCK_N": n, "BLOCK_K": k}, num_warps=warps, num_stages=stages)
    for n, k, warps, stages in _TILES
]
# Triton adds the dtypes to the key by itself. BLOCK_M stands for the number of tokens, the distance
# of channels for the storage.
KEY = ["H", "C", "BLOCK_M", "by_c"]
# The interpreter multiplies bfloat16 as the integers that hold it; in float32 products are exact.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _first(offset_E, expert, by_e, by_c, RAGGED: tl.constexpr):
    """Where the channels of an expert begin."""
    if RAGGED:
        return tl.load(offset_E + expert).to(tl.int64) * by_c
    return expert.to(tl.int64) * by_e


@triton.jit
def _dot(a, b, acc):
    b = b.to(a.dtype)  # float8 weights
    if _WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def _activate(v, NAME: tl.constexpr):
    if NAME == "silu":
        return v * tl.sigmoid(v)
    elif NAME == "gelu":
        return 0.5 * v * (1.0 + tl.math.erf(v * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # 0.5 * (1 + tanh(z)) is sigmoid(2 z)
        return v * tl.sigmoid(1.5957691216057308 * (v + 0.044715 * v * v * v))
    else:
        tl.static_assert(NAME == "relu2")
        return tl.where(v > 0, v * v, 0.0)


@triton.autotune(configs=CONFIGS, key=KEY, cache_results=True)
@triton.jit
def gate_up(
    x_TH,
    up,
    by_e,
    by_c,
    by_side,
    by_k,
    bias,
    bias_by_e,
    bias_by_c,
    bias_by_side,
    scale,
    scale_by_e,
    scale_by_c,
    scale_by_side,
    down_scale,
    down_scale_by_e,
    down_scale_by_c,
    h_SI,
    position_S,
    group_N,
    start_N,
    stop_N,
    offset_E,
    width_BE,
    E,
    B,
    K,
    I,  # channels of the largest expert: the row length of h
    H: tl.constexpr,
    C: tl.constexpr,
    RAGGED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Activations of a block of pairs at BLOCK_N channels; channels beyond the width stay as they
    are."""
    block = tl.program_id(0)
    start = tl.load(start_N + block)
    stop = tl.load(stop_N + block)
    if start >= stop:
        return
    group = tl.load(group_N + block)
    expert = group // B
    width = tl.load(width_BE + (group % B) * E + expert).to(tl.int32)
    if tl.program_id(1) * BLOCK_N >= width:
        return
    pair = start + tl.arange(0, BLOCK_M)
    channel = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here, kept = pair < stop, channel < width
    token = tl.load(position_S + pair, mask=here, other=0) // K
    rows = _first(offset_E, expert, by_e, by_c, RAGGED) + channel.to(tl.int64) * by_c
    first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, H, BLOCK_K):
        at = k + tl.arange(0, BLOCK_K)
        x = tl.load(
            x_TH + token.to(tl.int64)[:, None] * H + at[None, :],
            mask=here[:, None] & (at < H)[None, :],
            other=0.0,
        )
        source = up + rows[None, :] + (at.to(tl.int64) * by_k)[:, None]
        mask = kept[None, :] & (at < H)[:, None]
        first = _dot(x, tl.load(source, mask=mask, other=0.0), first)
        if C == 2:
            second = _dot(x, tl.load(source + by_side, mask=mask, other=0.0), second)
    if SCALED:
        at = _first(offset_E, expert, scale_by_e, scale_by_c, RAGGED) + channel * scale_by_c
        first *= tl.load(scale + at, mask=kept, other=0.0)[None, :]
        if C == 2:
            second *= tl.load(scale + at + scale_by_side, mask=kept, other=0.0)[None, :]
    if BIAS:
        at = _first(offset_E, expert, bias_by_e, bias_by_c, RAGGED) + channel * bias_by_c
        first += tl.load(bias + at, mask=kept, other=0.0).to(tl.float32)[None, :]
        if C == 2:
            at += bias_by_side
            second += tl.load(bias + at, mask=kept, other=0.0).to(tl.float32)[None, :]
    h = _activate(first, ACTIVATION)
    if C == 2:
        h *= second
    if SCALED:  # a channel's row of down is scaled by scaling its activation
        at = _first(offset_E, expert, down_scale_by_e, down_scale_by_c, RAGGED)
        at += channel * down_scale_by_c
        h *= tl.load(down_scale + at, mask=kept, other=0.0)[None, :]
    tl.store(
        h_SI + pair.to(tl.int64)[:, None] * I + channel[None, :],
        h.to(h_SI.dtype.element_ty),
        mask=here[:, None] & kept[None, :],
    )


@triton.autotune(configs=CONFIGS, key=KEY, cache_results=True)
@triton.jit
def down(
    h_SI,
    down,
    by_e,
    by_c,
    by_j,
    bias_EH,
    weight_S,
    y_SH,
    position_S,
    group_N,
    start_N,
    stop_N,
    offset_E,
    width_BE,
    E,
    B,
    I,
    H: tl.constexpr,
    C: tl.constexpr,  # for the key alone: what is tuned for gated experts
    RAGGED: tl.constexpr,
    BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weighted outputs of a block of pairs at BLOCK_N of H, each at its place [token, choice]; the
    sum runs over the channels of the prefix alone."""
    block = tl.program_id(0)
    start = tl.load(start_N + block)
    stop = tl.load(stop_N + block)
    if start >= stop:
        return
    group = tl.load(group_N + block)
    expert = group // B
    width = tl.load(width_BE + (group % B) * E + expert).to(tl.int32)
    pair = start + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    here, inside = pair < stop, column < H
    first = down + _first(offset_E, expert, by_e, by_c, RAGGED)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, width, BLOCK_K):
        channel = k + tl.arange(0, BLOCK_K)
        kept = channel < width
        h = tl.load(
            h_SI + pair.to(tl.int64)[:, None] * I + channel[None, :],
            mask=here[:, None] & kept[None, :],
            other=0.0,
        )
        w = tl.load(
            first + (channel.to(tl.int64) * by_c)[:, None] + (column.to(tl.int64) * by_j)[None, :],
            mask=kept[:, None] & inside[None, :],
            other=0.0,
        )
        acc = _dot(h, w, acc)
    if BIAS:
        bias = tl.load(bias_EH + expert.to(tl.int64) * H + column, mask=inside, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    position = tl.load(position_S + pair, mask=here, other=0).to(tl.int64)
    weight = tl.load(weight_S + position, mask=here, other=0.0).to(tl.float32)
    tl.store(
        y_SH + position[:, None] * H + column[None, :],
        acc * weight[:, None],
        mask=here[:, None] & inside[None, :],
    )


@triton.jit
def combine(y_SH, index_S, out_TH, E, K, H: tl.constexpr, BLOCK: tl.constexpr):
    """Sum over the choices of a token, in their order; experts held elsewhere wrote nothing."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in range(0, K):
        expert = tl.load(index_S + token * K + k)
        if (expert >= 0) & (expert < E):
            acc += tl.load(y_SH + (token * K + k) * H + column, mask=column < H, other=0.0)
    tl.store(out_TH + token * H + column, acc.to(out_TH.dtype.element_ty), mask=column < H)
