"""Device code of the Triton back end. A block of routed pairs is of one expert, and as wide as the
widest of its pairs; widths and offsets are read from memory, never compiled in."""

from __future__ import annotations

import triton
import triton.language as tl

from flexmoe.kernels.triton_pairs import jit
from flexmoe.kernels.triton_tiles import DEPTH, DOWN_COLUMNS, UP_COLUMNS, tuned

GROUP = tl.constexpr(8)  # blocks side by side

# The interpreter multiplies bfloat16 as the integers that hold it; in float32 products are exact.
_WIDEN = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _tile(N, tiles):
    """Block of pairs and tile of columns of a program: GROUP blocks, some of them of one expert, go
    through the tiles side by side, so that what they read is in the cache."""
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles) * GROUP
    side_by_side = min(N - first, GROUP)
    within = pid - first * tiles
    return first + within % side_by_side, within // side_by_side


@triton.jit
def _block(expert_N, start_N, stop_N, block, E, ALONE: tl.constexpr):
    """Expert of a block, and its first pair and the one after its last."""
    if ALONE:
        expert = tl.load(expert_N + block).to(tl.int32)
        return expert, block, tl.where((expert >= 0) & (expert < E), block + 1, block)
    else:
        return tl.load(expert_N + block), tl.load(start_N + block), tl.load(stop_N + block)


@triton.jit
def _position(position_S, pair, stop, ALONE: tl.constexpr):
    """Places of pairs. A mask would be asked in every step of the products: pairs too many are the
    last one again."""
    if ALONE:
        return tl.minimum(pair, stop - 1)
    else:
        return tl.load(position_S + tl.minimum(pair, stop - 1))


@triton.jit
def _first(offset_E, expert, by_e, by_c, RAGGED: tl.constexpr):
    """Where the channels of an expert begin."""
    if RAGGED:
        return tl.load(offset_E + expert).to(tl.int64) * by_c
    return expert.to(tl.int64) * by_e


@triton.jit
def _width(width_BE, token_budget_T, expert, token, E, MIXED: tl.constexpr):
    """Channels of each pair, and the most of them."""
    if MIXED:
        width_M = tl.load(width_BE + tl.load(token_budget_T + token) * E + expert).to(tl.int32)
        return width_M, tl.max(width_M)
    else:
        width = tl.load(width_BE + expert).to(tl.int32)
        return width, width


@triton.jit
def _load(at, inside, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside, other=0.0)


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
        return tl.where(v < 0, 0.0, v * v)  # NaN stays


@tuned(
    few=[(128, 128, 8, 3), (64, 256, 8, 3), (64, 128, 4, 4), (64, 128, 4, 2), (32, 256, 4, 2)],
    many=[(128, 64, 8, 4), (128, 64, 8, 3), (64, 64, 4, 3)],
    rows=[(UP_COLUMNS, DEPTH, 8, 4)],
)
@jit
def gate_up(
    x_TH,
    x_rows,  # of sorted pairs; descriptors, as the next, where ROWS
    up,
    up_rows,
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
    expert_N,
    start_N,
    stop_N,
    offset_E,
    width_BE,
    token_budget_T,
    N,
    E,
    K,
    I,  # row length of h: the channels of the largest expert, padded
    H: tl.constexpr,
    C: tl.constexpr,
    RAGGED: tl.constexpr,
    MIXED: tl.constexpr,
    ALONE: tl.constexpr,
    ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    SCALED: tl.constexpr,
    BIAS: tl.constexpr,
    PAD: tl.constexpr,
    GPU: tl.constexpr,  # for the key alone
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Activations of a block of pairs at BLOCK_N channels; zeros beyond a pair's width."""
    tl.static_assert(PAD % BLOCK_N == 0)
    block, tile = _tile(N, tl.cdiv(I, BLOCK_N))
    expert, start, stop = _block(expert_N, start_N, stop_N, block, E, ALONE)
    if start >= stop:
        return
    pair = start + tl.arange(0, BLOCK_M)
    token = _position(position_S, pair, stop, ALONE) // K
    width_M, width = _width(width_BE, token_budget_T, expert, token, E, MIXED)
    if tile * BLOCK_N >= tl.cdiv(width, PAD) * PAD:
        return
    channel = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    h_at = h_SI + pair.to(tl.int64)[:, None] * I + channel[None, :]
    here = (pair < stop)[:, None]
    if tile * BLOCK_N >= width:
        tl.store(h_at, tl.zeros((BLOCK_M, BLOCK_N), h_SI.dtype.element_ty), mask=here)
        return
    row = tl.minimum(channel, width - 1)  # no mask, as for pairs
    first = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    second = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if ROWS:
        gate_row = (_first(offset_E, expert, by_e, by_c, RAGGED) // by_c).to(tl.int32)
        gate_row += tile * BLOCK_N
        up_row, up_column = gate_row + by_side // by_c, by_side % by_c
        for k in range(0, H, BLOCK_K):
            x = x_rows.load([start, k])
            first = _dot(x, up_rows.load([gate_row, k]).T, first)
            if C == 2:
                second = _dot(x, up_rows.load([up_row, up_column + k]).T, second)
    else:
        at = tl.arange(0, BLOCK_K)
        x_at = x_TH + token.to(tl.int64)[:, None] * H + at[None, :]
        up_at = up + _first(offset_E, expert, by_e, by_c, RAGGED)
        up_at += (row.to(tl.int64) * by_c)[None, :] + (at.to(tl.int64) * by_k)[:, None]
        for k in range(0, H, BLOCK_K):
            x = _load(x_at, (k + at < H)[None, :], H % BLOCK_K == 0)
            inside = (k + at < H)[:, None]
            first = _dot(x, _load(up_at, inside, H % BLOCK_K == 0), first)
            if C == 2:
                second = _dot(x, _load(up_at + by_side, inside, H % BLOCK_K == 0), second)
            x_at += BLOCK_K
            up_at += BLOCK_K * by_k
    if SCALED:
        at = _first(offset_E, expert, scale_by_e, scale_by_c, RAGGED) + row * scale_by_c
        first *= tl.load(scale + at)[None, :]
        if C == 2:
            second *= tl.load(scale + at + scale_by_side)[None, :]
    if BIAS:
        at = _first(offset_E, expert, bias_by_e, bias_by_c, RAGGED) + row * bias_by_c
        first += tl.load(bias + at).to(tl.float32)[None, :]
        if C == 2:
            second += tl.load(bias + at + bias_by_side).to(tl.float32)[None, :]
    h = _activate(first, ACTIVATION)
    if C == 2:
        h *= second
    if SCALED:  # a channel's row of down is scaled by scaling its activation
        at = _first(offset_E, expert, down_scale_by_e, down_scale_by_c, RAGGED)
        h *= tl.load(down_scale + at + row * down_scale_by_c)[None, :]
    if MIXED:
        h = tl.where(channel[None, :] < width_M[:, None], h, 0.0)
    else:
        h = tl.where(channel[None, :] < width, h, 0.0)
    tl.store(h_at, h.to(h_SI.dtype.element_ty), mask=here)


@tuned(
    few=[(256, 64, 8, 4), (128, 64, 4, 5), (128, 64, 4, 3), (128, 128, 4, 4)],
    many=[(256, 64, 8, 4), (256, 32, 8, 5), (128, 64, 4, 3)],
    rows=[(DOWN_COLUMNS, DEPTH, 8, 4), (DOWN_COLUMNS, DEPTH, 8, 3)],
)
@jit
def down(
    h_SI,
    h_rows,  # descriptors, as the next, where ROWS
    down,
    down_rows,
    by_e,
    by_c,
    by_j,
    bias_EH,
    weight_S,
    y_ZSH,
    position_S,
    expert_N,
    start_N,
    stop_N,
    offset_E,
    width_BE,
    token_budget_T,
    N,
    E,
    K,
    I,
    S,
    H: tl.constexpr,
    C: tl.constexpr,  # for the key alone: what is tuned for gated experts
    RAGGED: tl.constexpr,
    MIXED: tl.constexpr,
    ALONE: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    PAD: tl.constexpr,
    ROUND: tl.constexpr,  # channels read together, as far as memory is there
    SPLIT: tl.constexpr,
    GPU: tl.constexpr,  # for the key alone
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weighted outputs of a block of pairs at BLOCK_N of H, each at its place [token, choice]; the
    sum runs over the channels of the prefix alone, or over one part of SPLIT of them."""
    tl.static_assert(PAD % BLOCK_K == 0)
    block, tile = _tile(N, tl.cdiv(H, BLOCK_N))
    expert, start, stop = _block(expert_N, start_N, stop_N, block, E, ALONE)
    if start >= stop:
        return
    pair = start + tl.arange(0, BLOCK_M)
    position = _position(position_S, pair, stop, ALONE)
    _, width = _width(width_BE, token_budget_T, expert, position // K, E, MIXED)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (column < H)[None, :]
    steps = tl.cdiv(tl.cdiv(width, BLOCK_K), SPLIT)
    begin = tl.program_id(1) * steps * BLOCK_K
    end = tl.minimum(width, begin + steps * BLOCK_K)
    limit = tl.cdiv(width, ROUND) * ROUND
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if ROWS:  # but for the last, where rows beyond the width, which may hold anything, are none
        row = (_first(offset_E, expert, by_e, by_c, RAGGED) // by_c).to(tl.int32)
        whole = begin + (end - begin) // BLOCK_K * BLOCK_K
        for k in range(begin, whole, BLOCK_K):
            w = down_rows.load([row + k, tile * BLOCK_N])
            acc = _dot(h_rows.load([start, k]), w, acc)
        begin = whole
    channel = begin + tl.arange(0, BLOCK_K)
    h_at = h_SI + tl.minimum(pair, stop - 1).to(tl.int64)[:, None] * I + channel[None, :]
    down_at = down + _first(offset_E, expert, by_e, by_c, RAGGED)
    down_at += (channel.to(tl.int64) * by_c)[:, None] + (column.to(tl.int64) * by_j)[None, :]
    for _k in tl.range(begin, end, BLOCK_K, num_stages=1 if ROWS else None):
        h = tl.load(h_at)
        kept = (channel < limit)[:, None]
        if H % BLOCK_N != 0:
            kept = kept & inside
        acc = _dot(h, tl.load(down_at, mask=kept, other=0.0), acc)
        channel += BLOCK_K
        h_at += BLOCK_K
        down_at += BLOCK_K * by_c
    if BIAS:
        if tl.program_id(1) == 0:
            bias = tl.load(bias_EH + expert.to(tl.int64) * H + column, mask=column < H, other=0.0)
            acc += bias.to(tl.float32)[None, :]
    acc *= tl.load(weight_S + position).to(tl.float32)[:, None]
    place = (tl.program_id(1) * S + position).to(tl.int64)
    tl.store(
        y_ZSH + place[:, None] * H + column[None, :],
        acc.to(y_ZSH.dtype.element_ty),
        mask=(pair < stop)[:, None] & inside,
    )


@jit
def combine(
    y_ZSH,
    index_S,
    out_TH,
    S,
    E,
    H: tl.constexpr,
    K: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum over the choices of a token, in their order; experts held elsewhere wrote nothing."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for k in tl.static_range(K):
        expert = tl.load(index_S + token * K + k)
        here = tl.where((expert >= 0) & (expert < E), H, 0)
        for z in tl.static_range(SPLIT):
            y_at = y_ZSH + (z * S + token * K + k) * H + column
            acc += tl.load(y_at, mask=column < here, other=0.0).to(tl.float32)
    tl.store(out_TH + token * H + column, acc.to(out_TH.dtype.element_ty), mask=column < H)
