"""Minimal pairs: does the model find the good sentence of two more likely than the bad one?

As in BLiMP (Warstadt et al., 2020, arXiv 1912.00582): a pair is right when the good sentence has
the higher total log-probability, half right when both have the same; chance is one half.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.data import check_tokens
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.intervals import Array, Interval, interval, resampled_means, share_interval
from flexmoe.evaluation.members import Key, Members, device_of
from flexmoe.jsonl import records
from flexmoe.progress import Track, silent

log = logging.getLogger(__name__)

CHANCE = 0.5
NEEDED, OPTIONAL = ("sentence_good", "sentence_bad"), ("paradigm", "field")
RATIOS = ("ratio", "ratio_interval", "margin_ratio", "margin_ratio_interval")


@dataclass(frozen=True)
class Pair:
    """One line of a pairs file. ``paradigm`` is the kind of pair, ``field`` what kinds belong to;
    both may be empty."""

    good: str
    bad: str
    paradigm: str
    field: str
    line: int


@dataclass(frozen=True)
class Encoded:
    """Pairs as tokens: the distinct ``sequences``, longest first, each with a begin token; pair n
    is ``sequences[good_N[n]]`` and ``sequences[bad_N[n]]``."""

    sequences: list[list[int]]
    good_N: Tensor
    bad_N: Tensor


def read_pairs(path: str | Path, per_paradigm: int | None = None) -> list[Pair]:
    """The pairs of a ``.jsonl`` or ``.jsonl.gz`` file, the first ``per_paradigm`` of each paradigm
    (None: all). A `FlexmoeError` names the line that is no pair."""
    if per_paradigm is not None and per_paradigm < 1:
        raise FlexmoeError(f"pairs per paradigm must be at least 1, found {per_paradigm}")
    fields = "sentence_good, sentence_bad and, if you like, paradigm and field"
    found: list[Pair] = []
    seen: Counter[str] = Counter()
    for number, record in records(path, "pairs", fields):
        pair = _pair(record, f"{path}, line {number}", number)
        seen[pair.paradigm] += 1
        if per_paradigm is None or seen[pair.paradigm] <= per_paradigm:
            found.append(pair)
    return found


def _pair(record: dict[str, Any], where: str, number: int) -> Pair:
    for name in NEEDED:
        if not isinstance(record.get(name), str) or not record[name].strip():
            found = repr(record[name])[:60] if name in record else f"only {list(record)}"
            raise FlexmoeError(f"{where}: expected a sentence in field '{name}', found {found}")
    for name in OPTIONAL:
        if not isinstance(record.get(name) or "", str):
            raise FlexmoeError(
                f"{where}: expected text in field '{name}', found {record[name]!r}: quote it"
            )
    good, bad = (record[name] for name in NEEDED)  # BLiMP has a few that are the same: a tie
    return Pair(good, bad, record.get("paradigm") or "", record.get("field") or "", number)


def encode(pairs: Sequence[Pair], tokenizer: Any, config: Any) -> Encoded:
    """Tokens of ``pairs``, the tokenizer's begin or end token before each sentence (as
    `flexmoe.data` has it before each document).

    Raises `FlexmoeError` if the model of ``config`` does not know the tokens or a sentence is
    longer than its context.
    """
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if mark is None:
        raise FlexmoeError(
            "the tokenizer has neither a begin nor an end token to put before a sentence, so its "
            "first word cannot be scored: set bos_token in tokenizer_config.json"
        )
    texts = [text for pair in pairs for text in (pair.good, pair.bad)]
    ids = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    sentences = [(mark, *tokens) for tokens in ids]
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    for number, tokens in enumerate(sentences):
        if context and len(tokens) > context:
            raise FlexmoeError(
                f"the pair of line {pairs[number // 2].line} has a sentence of {len(tokens)} "
                f"tokens, the model's context is {context}: shorten it or remove the line"
            )
    # A sentence of several pairs is scored once, and two of the same tokens tie exactly.
    distinct = sorted(set(sentences), key=lambda tokens: (-len(tokens), tokens))
    check_tokens(torch.tensor([max(tokens) for tokens in distinct]), config)
    place = {tokens: at for at, tokens in enumerate(distinct)}
    places_N2 = torch.tensor([place[tokens] for tokens in sentences]).view(-1, 2)
    return Encoded([list(tokens) for tokens in distinct], places_N2[:, 0], places_N2[:, 1])


def sequence_scores(model: nn.Module, sequences: Sequence[Sequence[int]]) -> Tensor:
    """Log-probability of each sequence given its first token, nats, float64 [n] on the CPU.

    They go through the model as one batch, padded on the right: real tokens do not see the
    padding, and only they are scored.
    """
    device = device_of(model)
    length = max(map(len, sequences))
    ids = torch.tensor([[*tokens, *[0] * (length - len(tokens))] for tokens in sequences])
    lengths = torch.tensor([len(tokens) for tokens in sequences])
    real = torch.arange(length) < lengths[:, None]
    ids, mask = ids.to(device), real.to(device)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
        # picked before they become float32: most of the memory of a step is logits
        predicted = logits[:, :-1][mask[:, 1:]].float()
        loss = F.cross_entropy(predicted, ids[:, 1:][mask[:, 1:]], reduction="none")
    sequence = real[:, 1:].nonzero()[:, 0]
    return torch.zeros(len(ids)).double().index_add_(0, sequence, -loss.cpu().double())


def right_pairs(
    members: Members,
    encoded: Encoded,
    *,
    tokens_per_step: int = 4096,
    track: Track = silent,
) -> dict[Key, Tensor]:
    """Whether each pair is right, float64 [N] of 1, 0.5 (a tie) and 0, by member; NaN where a
    sentence's log-probability is not finite."""
    slices = list(_slices(encoded.sequences, tokens_per_step))
    scores: dict[Key, list[Tensor]] = {key: [] for key in members}
    model: Any = None
    for key, batch in track([(key, batch) for key in scores for batch in slices], "pairs"):
        if not scores[key]:
            model = None  # or it could not go before the next one comes
            model = members[key]()
        scores[key].append(sequence_scores(model, encoded.sequences[batch]))
    right = {key: _right(torch.cat(found), encoded) for key, found in scores.items()}
    if any(right_N.isnan().any() for right_N in right.values()):
        log.warning(
            "log-probabilities of pairs are not finite: check that the tokenizer belongs to the "
            "model, or run in float32 (--device cpu)"
        )
    return right


def _slices(sequences: Sequence[Sequence[int]], tokens: int) -> Iterator[slice]:
    """Batches of at most ``tokens`` with padding (or one sequence): the longest comes first."""
    start = 0
    while start < len(sequences):
        stop = start + max(1, tokens // len(sequences[start]))
        yield slice(start, stop)
        start = stop


def _right(scores: Tensor, encoded: Encoded) -> Tensor:
    good_N, bad_N = scores[encoded.good_N], scores[encoded.bad_N]
    right_N = (good_N > bad_N).double() + CHANCE * (good_N == bad_N).double()
    return torch.where((good_N + bad_N).isfinite(), right_N, math.nan)


def pair_rows(
    pairs: Sequence[Pair], right: Mapping[Key, Tensor], base: Key | None = 0.0
) -> dict[Key, dict[str, Any]]:
    """What `right_pairs` come to, by member.

    ``n``; ``accuracy`` (share of pairs right) and its 95 % ``interval``, over pairs drawn within
    each paradigm; ``fields``, the accuracy of each field. Where ``base`` is among them:
    ``ratio`` of the accuracies and ``margin_ratio``, the ratio of what lies above chance,
    each with a paired interval; the latter are None where the base itself cannot be told from
    chance. Intervals are None where there are too few pairs for one, and those of ratios also
    where no pair makes a difference: resampling would be certain.
    """
    right_NB = np.stack([right_N.numpy() for right_N in right.values()], 1)
    groups = _groups([pair.paradigm for pair in pairs])
    if min(map(len, groups.values())) < 2:  # no spread to be seen within one: over all pairs then
        groups = {"": list(range(len(pairs)))}
    means_RB = resampled_means([right_NB[group] for group in groups.values()])
    fields = _groups([pair.field for pair in pairs])
    fields.pop("", None)
    whole = list(right).index(base) if base is not None and base in right else None
    rows = {}
    for b, key in enumerate(right):
        row: dict[str, Any] = {
            "n": len(pairs),
            "accuracy": float(right_NB[:, b].mean()),
            "interval": _of_accuracy(right_NB[:, b], means_RB[:, b]),
            "fields": {name: float(right_NB[at, b].mean()) for name, at in fields.items()},
        }
        row |= dict.fromkeys(RATIOS)
        if whole is not None:
            accuracy = float(right_NB[:, whole].mean())
            spread = _of_accuracy(right_NB[:, whole], means_RB[:, whole])
            row |= _ratios(row["accuracy"], accuracy, means_RB[:, b], means_RB[:, whole], spread)
            if b != whole:
                row |= {name: None for name in RATIOS[1::2] if _is_empty(row[name])}
        rows[key] = row
    return rows


def _of_accuracy(right_N: Array, means_R: Array) -> Interval | None:
    """The interval of an accuracy; that of a share where resampling sees no spread."""
    spread = interval(means_R)
    return share_interval(round(right_N.sum()), len(right_N)) if _is_empty(spread) else spread


def _is_empty(spread: Interval | None) -> bool:
    return spread is not None and spread[0] == spread[1]


def _ratios(
    member: float, whole: float, member_R: Array, whole_R: Array, spread: Interval | None
) -> dict[str, Any]:
    """Of one budget to the base, from their accuracies and resampled accuracies; ``spread`` is the
    interval of the base's."""
    row: dict[str, Any] = {}
    with np.errstate(divide="ignore", invalid="ignore"):
        if whole > 0:
            row |= {"ratio": member / whole, "ratio_interval": interval(member_R / whole_R)}
        if whole > CHANCE and spread is not None and spread[0] > CHANCE:
            margins_R = (member_R - CHANCE) / (whole_R - CHANCE)
            row["margin_ratio"] = (member - CHANCE) / (whole - CHANCE)
            row["margin_ratio_interval"] = interval(margins_R)
    return row


def _groups(labels: Sequence[str]) -> dict[str, list[int]]:
    groups: dict[str, list[int]] = {}
    for at, label in enumerate(labels):
        groups.setdefault(label, []).append(at)
    return groups
