"""Which channels of which experts lie on which rank, under tensor and expert parallelism."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def local_channels(w: int, quantum: int, expert: int, rank: int, ranks: int) -> Tensor:
    """Which of an expert's first ``w`` channels lie on ``rank``, int64, in their order.

    Channels are dealt out in blocks of ``quantum``, one rank after the other, so that any prefix
    of the expert is a prefix on every rank and the ranks stay within one block of each other. The
    first block goes to another rank for the next expert: over the experts, that evens out too.
    """
    channel = torch.arange(w, device="cpu")  # vLLM loads under another default device
    return channel[(channel // quantum + expert) % ranks == rank]


def local_width(w: int, quantum: int, expert: int, rank: int, ranks: int) -> int:
    """How many of an expert's first ``w`` channels lie on ``rank``, see `local_channels`."""
    blocks, rest = divmod(w, quantum)
    turn = (rank - expert) % ranks  # the block of a round that is this rank's
    rounds, over = divmod(blocks, ranks)
    return (rounds + (turn < over)) * quantum + (rest if turn == over else 0)


def balanced(load_E: Sequence[float], ranks: int) -> list[int]:
    """The rank of every expert, so that the sums of ``load_E`` are about equal: the heaviest
    expert left goes to the lightest rank (longest processing time first: at most 4/3 of the best
    possible largest sum)."""
    rank_E, sums = [0] * len(load_E), [0.0] * ranks
    for e in sorted(range(len(load_E)), key=lambda e: (-load_E[e], e)):
        rank = min(range(ranks), key=lambda r: (sums[r], r))
        rank_E[e] = rank
        sums[rank] += load_E[e]
    return rank_E
