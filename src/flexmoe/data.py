"""Calibration and evaluation text: sources to token windows, drawn by a seed, with their hash.

Documents and conversations are packed: one after the other fills windows without a gap, so there is
no padding that a statistic or a loss would have to leave out.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.headers import one_line
from flexmoe.sources import TINY as TINY
from flexmoe.sources import Document, Source, documents, parse_sources

CHARACTERS = 4  # about as many to a token


@dataclass(frozen=True)
class Windows:
    """Token windows ``ids`` int64 [n, seq_len], all full (no padding), and where they are from:
    ``source_n`` [n] is the place in ``sources`` of each."""

    ids: Tensor
    spec: str
    sources: tuple[str, ...]
    source_n: Tensor

    @property
    def sha256(self) -> str:
        """`tokens_sha256` of all windows."""
        return tokens_sha256(self.ids)

    def batches(self, size: int) -> list[tuple[str, Tensor]]:
        """Batches of at most ``size`` windows, each of one source, source by source."""
        found = []
        for s, name in enumerate(self.sources):
            of_source = self.ids[self.source_n == s]
            found += [(name, batch) for batch in of_source.split(size) if len(batch)]
        return found


def tokens_sha256(ids: Tensor) -> str:
    """Hash of the very tokens."""
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()


@dataclass(frozen=True)
class Piece:
    """A part of a document, and whether the document begins and ends with it."""

    text: str
    first: bool
    last: bool


def token_windows(
    source: Source, tokenizer: Any, seq_len: int, most: int | None, seed: int | None
) -> Tensor:
    """At most ``most`` windows [n, seq_len] of one source.

    Documents stand in the source's order (seed None) or are cut into pieces of about four windows,
    which are shuffled, so that few windows come from many documents. The tokenizer's begin token
    stands before each document and its end token after it; between documents one is enough where
    they are the same, or there is only one. Conversations stay whole and look as the tokenizer's
    chat template makes them. Of a data set little more is read than needed.
    """
    need = None if most is None else most * seq_len
    pieces = _pieces(documents(source, seed), source, tokenizer, None if seed is None else seq_len)
    if seed is not None:
        if not source.is_file and need is not None:
            pieces = _until(pieces, 4 * CHARACTERS * need)
        shuffled = list(pieces)
        random.Random(f"{seed}/{source.name}").shuffle(shuffled)
        pieces = iter(shuffled)
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None or begin == end:
        begin, end = end, None
    tokens: list[int] = []
    for piece in pieces:
        tokens += [begin] if piece.first and begin is not None else []
        tokens += tokenizer(piece.text, add_special_tokens=False, verbose=False)["input_ids"]
        tokens += [end] if piece.last and end is not None else []
        if need is not None and len(tokens) >= need:
            break
    count = len(tokens) // seq_len if most is None else min(most, len(tokens) // seq_len)
    return torch.tensor(tokens[: count * seq_len], dtype=torch.long).view(count, seq_len)


def _pieces(
    found: Iterable[Document], source: Source, tokenizer: Any, seq_len: int | None
) -> Iterator[Piece]:
    """Documents whole, or cut into pieces of about four windows of ``seq_len`` tokens."""
    for number, document in enumerate(found, 1):
        if not isinstance(document, str):
            text = chat_text(document, tokenizer, f"{source.path}, conversation {number}")
            yield Piece(text, False, False)  # the template has marks of its own
            continue
        size = len(document) if seq_len is None else 4 * CHARACTERS * seq_len
        for at in range(0, len(document), max(size, 1)):
            yield Piece(document[at : at + size], at == 0, at + size >= len(document))


def _until(pieces: Iterable[Piece], characters: int) -> Iterator[Piece]:
    """Pieces until there are so many characters."""
    for piece in pieces:
        yield piece
        characters -= len(piece.text)
        if characters <= 0:
            return


def chat_text(messages: list[dict[str, Any]], tokenizer: Any, where: str) -> str:
    """A conversation as the tokenizer's chat template writes it."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise FlexmoeError(
            f"{where} has messages, and the model's tokenizer has no chat template: give text, or "
            "the checkpoint of a chat model"
        )
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError) as error:
        raise FlexmoeError(f"{where} does not fit the model's chat template: {error}") from None


def load_tokenizer(folder: Path, config: Any) -> Any:
    """The tokenizer of a checkpoint; a `FlexmoeError` if its files are missing or of another
    model (transformers makes an empty one up where there are no files)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers has no class of its own for damaged files
        reason = one_line(error)
        raise FlexmoeError(f"the tokenizer in {folder} cannot be loaded: {reason}") from error
    known, vocabulary = len(tokenizer), config.get_text_config().vocab_size
    if known < 100 or known > 2 * vocabulary:
        raise FlexmoeError(
            f"the tokenizer in {folder} knows {known} tokens, the model {vocabulary}: its files "
            "(tokenizer.json, ...) are missing or of another model"
        )
    return tokenizer


def check_tokens(ids: Tensor, config: Any) -> Tensor:
    """``ids`` if the model knows them all; else a `FlexmoeError`."""
    vocabulary = config.get_text_config().vocab_size
    if len(ids) and int(ids.max()) >= vocabulary:
        raise FlexmoeError(
            f"the text has token {int(ids.max())}, the model knows {vocabulary}: the tokenizer in "
            "the folder is of another model"
        )
    return ids


def calibration_windows(
    spec: str, tokenizer: Any, *, samples: int, seq_len: int, seed: int, fewer: bool = False
) -> Windows:
    """``samples`` windows from a mixture of sources, each in proportion to its weight; with
    ``fewer`` a source that is too short gives what it has."""
    if samples < 1:
        raise FlexmoeError(f"samples must be at least 1, found {samples}")
    sources = _mixture(parse_sources(spec, "train"))
    total = sum(source.weight for source in sources)
    parts: list[Tensor] = []
    drawn, weight = 0, 0.0
    for source in sources:
        weight += source.weight
        share = round(samples * weight / total) - drawn
        if not share and spec != "tiny":  # those of tiny stand for each other
            raise FlexmoeError(
                f"source '{source.name}' would give none of {samples} windows: more --samples, "
                "more weight, or leave it out"
            )
        ids = token_windows(source, tokenizer, seq_len, share, seed)
        if not len(ids) and share:
            raise FlexmoeError(
                f"{source.path} has no text for one window of {seq_len} tokens: lower --seq-len, "
                "or give more text"
            )
        if len(ids) < share and not fewer:
            raise FlexmoeError(
                f"{source.path} has text for {len(ids)} windows of {seq_len} tokens, {share} are "
                "wanted: lower --samples or --seq-len, or give more text"
            )
        parts.append(ids)
        drawn += share
    ids = torch.cat(parts)
    source_n = torch.arange(len(parts)).repeat_interleave(torch.tensor([len(p) for p in parts]))
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    names = tuple(source.name for source in sources)
    return Windows(ids[shuffled], spec, names, source_n[shuffled])


def _mixture(sources: list[Source]) -> list[Source]:
    """Each source once; of one given several times the weights add up."""
    found: dict[str, Source] = {}
    for source in sources:
        before = found[source.name].weight if source.name in found else 0.0
        found[source.name] = replace(source, weight=before + source.weight)
    return list(found.values())


def evaluation_windows(
    spec: str, tokenizer: Any, *, samples: int | None, seq_len: int
) -> dict[str, Tensor]:
    """The first ``samples`` windows (None: all) of each source in its own order, by its name."""
    if samples is not None and samples < 1:
        raise FlexmoeError(f"samples must be at least 1, found {samples}")
    windows = {}
    for source in parse_sources(spec, "valid"):
        if weighted := source.weighted:
            raise FlexmoeError(f"a weight has no effect in an evaluation: leave out '{weighted}'")
        if source.name in windows:
            raise FlexmoeError(f"two data sources are named '{source.name}': give each once")
        ids = token_windows(source, tokenizer, seq_len, samples, None)
        if not len(ids):
            raise FlexmoeError(f"{source.path} is shorter than one window of {seq_len} tokens")
        windows[source.name] = ids
    return windows


def pick_seq_len(asked: int | None, config: Any) -> int:
    """``asked``, or by default a quarter of the model's context and at most 2048 tokens."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 8192
    if asked is None:
        return max(16, min(2048, context // 4))
    if not 2 <= asked <= context:
        raise FlexmoeError(
            f"seq_len must be from 2 to the model's context of {context} tokens, found {asked}"
        )
    return asked


def check_seed(seed: int) -> None:
    """`FlexmoeError` for a seed of which no others can be made for steps and windows."""
    if not 0 <= seed < 2**40:
        raise FlexmoeError(f"seed must lie between 0 and 2^40, found {seed}")


def pick_batch_size(asked: int | None, seq_len: int) -> int:
    """``asked``, or by default 4096 tokens and at most 8 windows."""
    if asked is not None and asked < 1:
        raise FlexmoeError(f"batch size must be at least 1, found {asked}")
    return asked or max(1, min(8, 4096 // seq_len))
