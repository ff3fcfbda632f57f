"""Placement of channels and experts on ranks: nothing lost, prefixes stay prefixes, balanced."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.serve.vllm.placement import balanced, local_channels, local_width


def sums_of(load_E: list[int], rank_E: list[int], ranks: int) -> list[int]:
    sums = [0] * ranks
    for w, rank in zip(load_E, rank_E, strict=True):
        sums[rank] += w
    return sums


small = st.integers(0, 97)
ranks = st.integers(1, 5)
quanta = st.sampled_from([1, 3, 8])


@given(w=small, quantum=quanta, expert=small, ranks=ranks)
def test_ranks_share_out_every_channel_once(w, quantum, expert, ranks) -> None:
    parts = [local_channels(w, quantum, expert, rank, ranks) for rank in range(ranks)]
    assert torch.cat(parts).sort().values.tolist() == list(range(w))
    assert [len(p) for p in parts] == [
        local_width(w, quantum, expert, rank, ranks) for rank in range(ranks)
    ]
    sizes = sorted(map(len, parts))
    assert sizes[-1] - sizes[0] <= quantum


@given(w=small, more=small, quantum=quanta, expert=small, ranks=ranks)
def test_a_prefix_of_an_expert_is_a_prefix_on_every_rank(w, more, quantum, expert, ranks) -> None:
    for rank in range(ranks):
        short = local_channels(w, quantum, expert, rank, ranks)
        long = local_channels(w + more, quantum, expert, rank, ranks)
        assert torch.equal(long[: len(short)], short)


def test_the_first_block_goes_round_the_ranks() -> None:
    widths = [sum(local_width(8, 8, expert, rank, 4) for expert in range(16)) for rank in range(4)]
    assert widths == [32, 32, 32, 32]


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40), ranks)
def test_experts_are_placed_by_the_sum_of_their_widths(load_E, ranks) -> None:
    rank_E = balanced(load_E, ranks)
    sums = [
        sum(w for w, r in zip(load_E, rank_E, strict=True) if r == rank) for rank in range(ranks)
    ]
    assert len(rank_E) == len(load_E) and sum(sums) == sum(load_E)
    # the bound of a greedy placement: nobody is above the mean by more than the largest expert
    assert max(sums) <= sum(load_E) / ranks + max(load_E)


def test_placement_balances_where_counts_would_not() -> None:
    load_E = [100, 100, 100, 100, 1, 1, 1, 1]  # by count, rank 0 would hold all the weight
    rank_E = balanced(load_E, 2)
    assert [sum(w for w, r in zip(load_E, rank_E, strict=True) if r == k) for k in (0, 1)] == [
        202
    ] * 2
