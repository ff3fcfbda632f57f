"""Routed pairs sorted by expert on the device, for the products of triton_device.py."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Numbers that follow the number of tokens are not compiled in: every batch size would be compiled.
jit = triton.jit(do_not_specialize=["S", "N"])


@jit
def count(index_S, count_E, S, CHUNK: tl.constexpr):
    """Pairs of every expert."""
    expert = tl.program_id(0)
    found = tl.zeros((CHUNK,), dtype=tl.int32)
    for first in range(0, S, CHUNK):
        at = first + tl.arange(0, CHUNK)
        found += (tl.load(index_S + at, mask=at < S, other=-1) == expert).to(tl.int32)
    tl.store(count_E + expert, tl.sum(found))


@jit
def place(
    index_S,
    token_budget_T,
    count_E,
    position_S,
    expert_N,
    start_N,
    stop_N,
    S,
    K,
    E,
    N,
    MIXED: tl.constexpr,
    SIZE: tl.constexpr,
    EXPERTS: tl.constexpr,  # a power of two from E on
    CHUNK: tl.constexpr,
):
    """Pairs of one expert and budget to their places, in their order; with budget 0 the blocks of
    the expert too. Expert E, which is none, has the places and blocks that are left and empty."""
    expert, budget = tl.program_id(0), tl.program_id(1)
    all_E = tl.arange(0, EXPERTS)
    count_of = tl.load(count_E + all_E, mask=all_E < E, other=0)
    earlier = all_E < expert
    start = tl.sum(tl.where(earlier, count_of, 0))
    stop = start + tl.sum(tl.where(all_E == expert, count_of, 0))
    if budget == 0:
        block = tl.sum(tl.where(earlier, (count_of + SIZE - 1) // SIZE, 0))
        end = tl.where(expert == E, N, block + (stop - start + SIZE - 1) // SIZE)
        for first in range(block, end, 128):
            n = first + tl.arange(0, 128)
            begin = tl.minimum(start + (n - block) * SIZE, stop)
            tl.store(expert_N + n, tl.minimum(expert, E - 1), mask=n < end)
            tl.store(start_N + n, begin, mask=n < end)
            tl.store(stop_N + n, tl.minimum(begin + SIZE, stop), mask=n < end)
        for first in range(tl.where(expert == E, start, S), S, 128):
            at = first + tl.arange(0, 128)
            tl.store(position_S + at, 0 * at, mask=at < S)
    if start == stop:
        return
    if MIXED:
        poorer = tl.zeros((CHUNK,), dtype=tl.int32)
        for first in range(0, S, CHUNK):
            at = first + tl.arange(0, CHUNK)
            own = tl.load(index_S + at, mask=at < S, other=-1) == expert
            of = tl.load(token_budget_T + at // K, mask=own, other=0)
            poorer += (own & (of < budget)).to(tl.int32)
        start += tl.sum(poorer)
    for first in range(0, S, CHUNK):
        at = first + tl.arange(0, CHUNK)
        own = tl.load(index_S + at, mask=at < S, other=-1) == expert
        if MIXED:
            own = own & (tl.load(token_budget_T + at // K, mask=own, other=-1) == budget)
        own_int = own.to(tl.int32)
        tl.store(position_S + start + tl.cumsum(own_int) - 1, at, mask=own)
        start += tl.sum(own_int)


@jit
def gather(x_TH, position_S, x_SH, K, H: tl.constexpr, BLOCK: tl.constexpr):
    """The token of every sorted pair."""
    row = tl.program_id(0).to(tl.int64)
    token = (tl.load(position_S + row) // K).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_TH + token * H + column, mask=column < H)
    tl.store(x_SH + row * H + column, x, mask=column < H)


class Blocks(NamedTuple):
    """Pairs sorted by expert, and by budget within, and cut into blocks of one expert each.

    ``position_S`` is the place t * K + k of each sorted pair, then zeros; block n holds the sorted
    pairs ``start_N[n]`` to ``stop_N[n]``, of expert ``expert_N[n]``. N is the most there can be of
    them; those too many are empty. Pairs of a single token are blocks as they are: only
    ``expert_N`` is there.
    """

    position_S: Tensor | None
    expert_N: Tensor
    start_N: Tensor | None
    stop_N: Tensor | None


def sort(index_TK: Tensor, E: int, token_budget_T: Tensor | None, B: int, size: int) -> Blocks:
    """Blocks of at most ``size`` pairs, made on the device in a space that sizes alone decide.
    Pairs of experts held elsewhere are in no block."""
    S, K = index_TK.numel(), index_TK.shape[1]
    filled = min(S, E)  # experts with pairs, at most
    N = filled + (S - filled) // size
    sizes = (E, S, N, N, N)
    starts = [-(-n // 4) * 4 for n in sizes]  # at multiples of 16 bytes, which are compiled in
    made = index_TK.new_empty(sum(starts), dtype=torch.int32).split(starts)
    count_E, *blocks = (part[:n] for part, n in zip(made, sizes, strict=True))
    chunk, warps = (4096, 16) if S > 256 else (256, 4)  # pairs looked at at once
    count[(E,)](index_TK, count_E, S, CHUNK=chunk, num_warps=warps)
    mixed = token_budget_T is not None
    place[(E + 1, B if mixed else 1)](
        index_TK,
        token_budget_T,
        count_E,
        *blocks,
        S,
        K,
        E,
        N,
        MIXED=mixed,
        SIZE=size,
        EXPERTS=1 << (E - 1).bit_length(),
        CHUNK=chunk,
        num_warps=warps,
    )
    return Blocks(*blocks)


def sorted_tokens(x_TH: Tensor, position_S: Tensor, K: int) -> Tensor:
    """Tokens [S, H] of sorted pairs; places without a pair hold any token."""
    S, H = len(position_S), x_TH.shape[1]
    x_SH = x_TH.new_empty(S, H)
    gather[(S, -(-H // 1024))](x_TH, position_S, x_SH, K, H=H, BLOCK=1024)
    return x_SH
