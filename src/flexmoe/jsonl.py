"""Text files, plain or gzipped, and JSON lines in them; what is none is named by its line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flexmoe.errors import FlexmoeError

SUFFIXES = (".jsonl", ".jsonl.gz")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A file to read text from; a `FlexmoeError` where it is not UTF-8, or cut short."""
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            yield file
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FlexmoeError(f"{path} cannot be read as UTF-8 text: {error}") from None


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and value of every line that is not blank."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                raise FlexmoeError(f"{path}, line {number}: not valid JSON ({error})") from None
            yield number, found


def records(path: str | Path, what: str, fields: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """`json_lines` of a file of objects. ``what`` the file is (``pairs``) and the ``fields`` its
    objects have are for the message of the `FlexmoeError`."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FlexmoeError(
            f"{what} file '{path}' does not exist. Give a file ({', '.join(SUFFIXES)}) with an "
            f"object a line: {fields}"
        )
    if not path.name.endswith(SUFFIXES):
        raise FlexmoeError(f"'{path}': expected a file ending in {' or '.join(SUFFIXES)}")
    empty = True
    for number, found in json_lines(path):
        if not isinstance(found, dict):
            kind = type(found).__name__
            raise FlexmoeError(f"{path}, line {number}: expected an object, found {kind}")
        yield number, found
        empty = False
    if empty:
        raise FlexmoeError(f"{path} is empty: expected an object a line: {fields}")
