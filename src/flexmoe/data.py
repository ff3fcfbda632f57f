"""Calibration and evaluation text: files to token windows, drawn by a seed, with a content hash."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError

TINY = Path(__file__).parent / "tiny"
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")


@dataclass(frozen=True)
class Source:
    """One text file and its weight in a mixture."""

    path: Path
    weight: float = 1.0
    weighted: str = ""  # the weight as it was written, if it was

    @property
    def name(self) -> str:
        """File name without its suffixes: ``books.valid``."""
        return self.path.name.removesuffix(".gz").removesuffix(".txt").removesuffix(".jsonl")


@dataclass(frozen=True)
class Windows:
    """Token windows ``ids`` int64 [n, seq_len], all full (no padding), and where they are from."""

    ids: Tensor
    spec: str

    @property
    def sha256(self) -> str:
        """Hash of the very tokens."""
        return hashlib.sha256(self.ids.numpy().tobytes()).hexdigest()


def parse_sources(spec: str, split: str) -> list[Source]:
    """``a.jsonl.gz:512,b.txt`` as sources. Names of shipped texts are known too: ``tiny`` means
    all four domains of ``split`` (``train`` or ``valid``), ``books.valid`` one of them."""
    sources = []
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name, colon, number = part.rpartition(":")
        weighted = f":{number}"
        if not colon or not number.replace(".", "", 1).isdigit():
            name, number, weighted = part, "1", ""
        if float(number) <= 0:
            raise FlexmoeError(f"--data {part}: the weight must be above 0")
        paths = [Path(name)]
        if name == "tiny":
            paths = sorted(TINY.glob(f"*.{split}.jsonl.gz"))
        elif (TINY / f"{name}.jsonl.gz").is_file() and not paths[0].exists():
            paths = [TINY / f"{name}.jsonl.gz"]
        for path in paths:
            if not path.is_file():
                raise FlexmoeError(
                    f"data file '{path}' does not exist. Give text files ({', '.join(SUFFIXES)}), "
                    "several with commas, each with a weight if you like (a.jsonl:512,b.txt:256), "
                    "or 'tiny' for the texts that come with flexmoe"
                )
            if not path.name.endswith(SUFFIXES):
                raise FlexmoeError(f"'{path}': expected a file ending in {', '.join(SUFFIXES)}")
        sources += [Source(path, float(number) / len(paths), weighted) for path in paths]
    if not sources:
        raise FlexmoeError("--data is empty: give at least one text file")
    return sources


def documents(path: Path) -> Iterator[str]:
    """The texts of a file: one a line in JSON lines (field ``text``), else the whole file."""
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        yield from _documents(path, opener)
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FlexmoeError(f"{path} cannot be read as UTF-8 text: {error}") from None


def _documents(path: Path, opener: Callable[..., Any]) -> Iterator[str]:
    with opener(path, "rt", encoding="utf-8") as file:
        if ".jsonl" not in path.name:
            yield file.read()
            return
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise FlexmoeError(f"{path}, line {number}: not valid JSON ({error})") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                found = list(record) if isinstance(record, dict) else type(record).__name__
                raise FlexmoeError(
                    f"{path}, line {number}: expected an object with a field 'text', found {found}"
                )
            yield record["text"]


def token_windows(
    source: Source, tokenizer: Any, seq_len: int, most: int | None, seed: int | None
) -> Tensor:
    """At most ``most`` windows [n, seq_len] of one source.

    Documents stand in file order (seed None) or are cut into pieces of about four windows, which
    are shuffled, so that few windows come from many documents. The tokenizer's begin or end token
    stands before each document.
    """
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    size = 16 * seq_len if seed is not None else None  # characters, about four to a token
    pieces = [piece for text in documents(source.path) for piece in _pieces(text, size)]
    if seed is not None:
        random.Random(f"{seed}/{source.name}").shuffle(pieces)
    need = None if most is None else most * seq_len
    tokens: list[int] = []
    for first, text in pieces:
        tokens += [mark] if first and mark is not None else []
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if need is not None and len(tokens) >= need:
            break
    count = len(tokens) // seq_len if most is None else min(most, len(tokens) // seq_len)
    return torch.tensor(tokens[: count * seq_len], dtype=torch.long).view(count, seq_len)


def _pieces(text: str, size: int | None) -> list[tuple[bool, str]]:
    """Parts of a document, and whether each is its beginning."""
    if size is None:
        return [(True, text)]
    return [(at == 0, text[at : at + size]) for at in range(0, len(text), size)]


def load_tokenizer(folder: Path, config: Any) -> Any:
    """The tokenizer of a checkpoint; a `FlexmoeError` if its files are missing or of another
    model (transformers makes an empty one up where there are no files)."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
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
    sources = parse_sources(spec, "train")
    total = sum(source.weight for source in sources)
    parts, drawn, weight = [], 0, 0.0
    for source in sources:
        weight += source.weight
        share = round(samples * weight / total) - drawn
        ids = token_windows(source, tokenizer, seq_len, share, seed)
        if len(ids) < (min(share, 1) if fewer else share):
            raise FlexmoeError(
                f"{source.path} has text for {len(ids)} windows of {seq_len} tokens, {share} are "
                "wanted: lower --samples or --seq-len, or give more text"
            )
        parts.append(ids)
        drawn += share
    ids = torch.cat(parts)
    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(seed))
    return Windows(ids[shuffled], spec)


def evaluation_windows(
    spec: str, tokenizer: Any, *, samples: int | None, seq_len: int
) -> dict[str, Tensor]:
    """The first ``samples`` windows (None: all) of each source in file order, by its name."""
    if samples is not None and samples < 1:
        raise FlexmoeError(f"samples must be at least 1, found {samples}")
    windows = {}
    for source in parse_sources(spec, "valid"):
        if weighted := source.weighted:
            raise FlexmoeError(f"a weight has no effect in an evaluation: leave out '{weighted}'")
        ids = token_windows(source, tokenizer, seq_len, samples, None)
        if not len(ids):
            raise FlexmoeError(f"{source.path} is shorter than one window of {seq_len} tokens")
        if source.name in windows:
            raise FlexmoeError(f"two data files are named '{source.name}': their rows would mix")
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


def pick_batch_size(asked: int | None, seq_len: int) -> int:
    """``asked``, or by default 4096 tokens and at most 8 windows."""
    if asked is not None and asked < 1:
        raise FlexmoeError(f"batch size must be at least 1, found {asked}")
    return asked or max(1, min(8, 4096 // seq_len))
