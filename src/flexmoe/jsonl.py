"""Objects from a file of JSON lines, plain or gzipped; what is none is named by its line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flexmoe.errors import FlexmoeError

SUFFIXES = (".jsonl", ".jsonl.gz")


def records(path: str | Path, what: str, fields: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank. ``what`` the file is (``pairs``) and
    the ``fields`` its objects have are for the message of the `FlexmoeError`."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FlexmoeError(
            f"{what} file '{path}' does not exist. Give a file ({', '.join(SUFFIXES)}) with an "
            f"object a line: {fields}"
        )
    if not path.name.endswith(SUFFIXES):
        raise FlexmoeError(f"'{path}': expected a file ending in {' or '.join(SUFFIXES)}")
    opened: Any = gzip.open if path.name.endswith(".gz") else open
    count = 0
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, _record(line, f"{path}, line {number}")
                    count += 1
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise FlexmoeError(f"{path} cannot be read as UTF-8 text: {error}") from None
    if not count:
        raise FlexmoeError(f"{path} is empty: expected an object a line: {fields}")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except json.JSONDecodeError as error:
        raise FlexmoeError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise FlexmoeError(f"{where}: expected an object, found {type(found).__name__}")
    return found
