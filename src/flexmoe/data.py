"""Calibration and evaluation text: files to token windows, drawn by a seed, with a content hash."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

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
        if not colon or not number.replace(".", "", 1).isdigit():
            name, number = part, "1"
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
        sources += [Source(path, float(number) / len(paths)) for path in paths]
    if not sources:
        raise FlexmoeError("--data is empty: give at least one text file")
    return sources


def documents(path: Path) -> Iterator[str]:
    """The texts of a file: one a line in JSON lines (field ``text``), else the whole file."""
    opener = gzip.open if path.name.endswith(".gz") else open
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
    source: Source, tokenizer, seq_len: int, most: int | None, seed: int | None
) -> Tensor:
    """At most ``most`` windows [n, seq_len] of one source: documents in shuffled order (in file
    order for seed None), each behind the tokenizer's end or begin token, joined and cut."""
    texts = list(documents(source.path))
    if seed is not None:
        random.Random(f"{seed}/{source.name}").shuffle(texts)
    mark = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    need = None if most is None else most * seq_len
    tokens: list[int] = []
    for text in texts:
        tokens += [] if mark is None else [mark]
        tokens += tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if need is not None and len(tokens) >= need:
            break
    count = len(tokens) // seq_len if most is None else min(most, len(tokens) // seq_len)
    return torch.tensor(tokens[: count * seq_len], dtype=torch.long).view(count, seq_len)


def calibration_windows(spec: str, tokenizer, *, samples: int, seq_len: int, seed: int) -> Windows:
    """``samples`` windows from a mixture of sources, each in proportion to its weight."""
    sources = parse_sources(spec, "train")
    total = sum(source.weight for source in sources)
    parts, drawn, weight = [], 0, 0.0
    for source in sources:
        weight += source.weight
        share = round(samples * weight / total) - drawn
        ids = token_windows(source, tokenizer, seq_len, share, seed)
        if len(ids) < share:
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
    spec: str, tokenizer, *, samples: int | None, seq_len: int
) -> dict[str, Tensor]:
    """The first ``samples`` windows (None: all) of each source in file order, by its name."""
    windows = {}
    for source in parse_sources(spec, "valid"):
        ids = token_windows(source, tokenizer, seq_len, samples, None)
        if not len(ids):
            raise FlexmoeError(f"{source.path} is shorter than one window of {seq_len} tokens")
        if source.name in windows:
            raise FlexmoeError(f"two data files are named '{source.name}': their rows would mix")
        windows[source.name] = ids
    return windows


def default_seq_len(config) -> int:
    """A quarter of the model's context, at most 2048 tokens."""
    context = getattr(config.get_text_config(), "max_position_embeddings", None) or 8192
    return max(16, min(2048, context // 4))
