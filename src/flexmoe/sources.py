"""Where text comes from: files, folders and hub data sets, one document after the other."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flexmoe.errors import FlexmoeError
from flexmoe.headers import one_line
from flexmoe.jsonl import json_lines, opened

TINY = Path(__file__).parent / "tiny"
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
SHUFFLED = 1000  # documents of a stream that are shuffled at a time
NAME = re.compile(r"(?P<path>[^\[\]()]+)(\[(?P<subset>[^\[\]]+)\])?(\((?P<split>[^()]+)\))?")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
COMMA = re.compile(r",(?![^\[(]*[\])])")  # not within brackets

Document = str | list[dict[str, Any]]  # a text, or the messages of a conversation


@dataclass(frozen=True)
class Source:
    """A text file, or a data set (a folder or a hub id), and its weight in a mixture."""

    path: str
    weight: float = 1.0
    weighted: str = ""  # the weight as it was written, if it was
    subset: str | None = None
    split: str | None = None  # None: a file
    written: str = ""

    @property
    def is_file(self) -> bool:
        """Whether it is one file; a data set is read as a stream."""
        return self.split is None

    @property
    def name(self) -> str:
        """``books.valid`` for a file (no folder, no suffixes), a data set as it was written."""
        if self.written:
            return self.written
        return Path(self.path).name.removesuffix(".gz").removesuffix(".txt").removesuffix(".jsonl")


def parse_sources(spec: str, split: str) -> list[Source]:
    """``a.jsonl.gz:3,b.txt,folder,owner/name[subset](split):2`` as sources.

    Names of shipped texts are known too: ``tiny`` means all four domains of ``split`` (``train``
    or ``valid``), ``books.valid`` one of them. Data sets that name no split are read at ``train``
    or ``validation``.
    """
    sources: list[Source] = []
    for part in filter(None, (p.strip() for p in COMMA.split(spec))):
        name, number = split_weight(part)
        found = _find(name, split)
        weight = float(number or 1) / len(found)
        weighted = f":{number}" if number else ""
        sources += [replace(source, weight=weight, weighted=weighted) for source in found]
    if not sources:
        raise FlexmoeError("--data is empty: give at least one text file")
    # files of one name in several folders go by their paths
    names = Counter(name for name, _ in {(source.name, source.path) for source in sources})
    return [replace(s, written=s.path) if names[s.name] > 1 and s.is_file else s for s in sources]


def split_weight(part: str) -> tuple[str, str]:
    """``a.jsonl:3`` as name and weight, which is empty where there is none."""
    name, colon, number = part.rpartition(":")
    if not colon or not number.replace(".", "", 1).isdigit():
        return part, ""
    if float(number) <= 0:
        raise FlexmoeError(f"--data {part}: the weight must be above 0")
    return name, number


def _find(name: str, split: str) -> list[Source]:
    path = Path(name).expanduser()
    if name == "tiny":
        return [Source(str(file)) for file in sorted(TINY.glob(f"*.{split}.jsonl.gz"))]
    if (TINY / f"{name}.jsonl.gz").is_file() and not path.exists():
        return [Source(str(TINY / f"{name}.jsonl.gz"))]
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise FlexmoeError(f"'{path}': expected a file ending in {', '.join(SUFFIXES)}")
        return [Source(str(path))]
    if (match := NAME.fullmatch(name)) is not None:
        folder = Path(match["path"]).expanduser()
        place = str(folder) if folder.is_dir() else match["path"]
        # owner/name, or one of the old names without an owner, which need brackets to be seen
        parts = match["path"].count("/") + bool(match["subset"] or match["split"])
        if folder.is_dir() or (HUB_ID.fullmatch(place) and parts and not name.endswith(SUFFIXES)):
            split = match["split"] or {"valid": "validation"}.get(split, split)
            return [Source(place, subset=match["subset"], split=split, written=name)]
    raise FlexmoeError(
        f"data file '{path}' does not exist. Give text files ({', '.join(SUFFIXES)}), folders or "
        "hub ids like 'allenai/c4[en](train)', several with commas, each with a weight if you like "
        "(a.jsonl:512,b.txt:256), or 'tiny' for the texts that come with flexmoe"
    )


def documents(source: Source, seed: int | None = None) -> Iterator[Document]:
    """The documents of a source: one a line in JSON lines and one a row in data sets (field
    ``text``, or a conversation in ``messages``), else the whole file. With a ``seed`` a data set
    is shuffled as far as a stream can be; files are read in order."""
    path = Path(source.path)
    if not source.is_file:
        for number, record in enumerate(_records(source, seed), 1):
            yield _document(record, f"{source.name}, row {number}")
    elif ".jsonl" in path.name:
        for number, record in json_lines(path):
            yield _document(record, f"{path}, line {number}")
    else:
        with opened(path) as file:
            yield file.read()


def _records(source: Source, seed: int | None) -> Iterator[Any]:
    """The rows of a data set, of which no more is read than asked for."""
    try:
        import datasets
    except ImportError:
        raise FlexmoeError(
            f"'{source.name}' is a folder or a hub id, which the package datasets reads: "
            "pip install 'flexmoe[data]', or give files"
        ) from None
    try:
        rows = datasets.load_dataset(source.path, source.subset, split=source.split, streaming=True)
        yield from rows if seed is None else rows.shuffle(seed=seed, buffer_size=SHUFFLED)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = one_line(error)
        what = "folder" if Path(source.path).is_dir() else "hub data set"
        raise FlexmoeError(
            f"{what} '{source.name}' (split '{source.split}') cannot be read: {reason}. Check "
            "name[subset](split) and the connection; without a network give files, or a folder "
            "of .jsonl or .parquet files"
        ) from None


def _document(record: Any, where: str) -> Document:
    found: Any = type(record).__name__
    if isinstance(record, dict):
        messages, text = record.get("messages"), record.get("text")
        if messages and isinstance(messages, list):
            if all(isinstance(m, dict) and m.get("role") and "content" in m for m in messages):
                _check_text(json.dumps(messages, ensure_ascii=False, default=str), where)
                return messages
            raise FlexmoeError(f"{where}: 'messages' must be objects with a role and a content")
        if isinstance(text, str):
            _check_text(text, where)
            return text
        found = list(record)
    raise FlexmoeError(
        f"{where}: expected an object with a field 'text' (a string) or 'messages' (a list of "
        f"objects with role and content), found {found}"
    )


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape what no tokenizer takes
        half = ascii(text[error.start])
        raise FlexmoeError(
            f"{where}: {half} is half of a surrogate pair, which is no text"
        ) from None
