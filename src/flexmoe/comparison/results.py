"""The file of a comparison: one JSON object a line, only ever added to.

The first line says what was measured on what; the second one is the base model's; then comes a
line for each entry and budget, as soon as it is measured. A run that was killed goes on, and more
entries and budgets can be added later; other text, weights or settings are refused.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexmoe.errors import FlexmoeError
from flexmoe.files import check_file
from flexmoe.trace import same_weights

FORMAT = 1
Row = dict[str, Any]


class Results:
    """``settings`` are what every line was measured on; ``base`` the line of the base model, None
    before it was measured; ``rows`` those of entries and budgets, in the order of the file."""

    def __init__(self, path: Path, settings: Mapping[str, Any], lines: list[Row]):
        self.path, self.settings = path, dict(settings)
        self.base: Row | None = None
        self.rows: list[Row] = []
        for line in lines:
            self._take(line)

    def _take(self, line: Row) -> None:
        if "method" in line:
            self.rows.append(line)
        else:
            self.base = line

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, Any]) -> Results:
        """The file at ``path`` to go on with, or a new one. A `FlexmoeError` if it is of another
        comparison."""
        path = check_file(Path(path).expanduser())
        settings = json.loads(json.dumps(settings))
        if not path.is_file() or not path.stat().st_size:
            found = cls(path, settings, [])
            found._write({"format": FORMAT, "settings": settings})
            return found
        before = read(path)
        differ = [
            f"{key} was {_short(before.settings.get(key))}, is {_short(settings.get(key))}"
            for key in dict.fromkeys([*before.settings, *settings])
            if not _same(key, before.settings.get(key), settings.get(key))
        ]
        if differ:
            raise FlexmoeError(
                f"'{path}' holds results of another comparison: {'; '.join(differ)}. Give another "
                "--json, or the same settings (methods and budgets can be added)"
            )
        _cut_unfinished(path)
        return before

    def done(self, entry: str, pruned: float, method_sha256: str = "") -> bool:
        """Whether there is a line of this entry and budget. A `FlexmoeError` if there is any of a
        method's file of another sha256 than now: they could not be compared."""
        rows = [row for row in self.rows if row["method"] == entry]
        if any(row.get("method_sha256", "") != method_sha256 for row in rows):
            raise FlexmoeError(
                f"'{self.path}' has results of {entry} that were measured with another version of "
                "its file: give another --json"
            )
        return any(row["pruned"] == pruned for row in rows)

    def add(self, line: Row) -> None:
        """Write a line; it stays, whatever happens next."""
        line = json.loads(json.dumps(_finite(line)))
        self._write(line)
        self._take(line)

    def _write(self, line: Row) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read(path: str | Path) -> Results:
    """The results in a file; a last line that was cut short by the end of a run does not count."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise FlexmoeError(f"there is no file '{path}': make one with flexmoe compare")
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        found = [json.loads(line) for line in lines]
        first = found[0]
        if first["format"] != FORMAT:
            raise FlexmoeError(
                f"'{path}' has format {first['format']}, this flexmoe reads format {FORMAT}"
            )
        return Results(path, first["settings"], found[1:])
    except (ValueError, LookupError, TypeError):
        raise FlexmoeError(f"'{path}' is no file of flexmoe compare: give another --json") from None


def _cut_unfinished(path: Path) -> None:
    content = path.read_bytes()
    if not content.endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)


def _same(key: str, before: Any, now: Any) -> bool:
    if key == "weights_sha256" and before is not None:
        return same_weights(before, now)
    return before == now


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _finite(value: Any) -> Any:
    """JSON has no infinities: None instead."""
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
