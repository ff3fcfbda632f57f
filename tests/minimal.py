"""A few minimal pairs of English agreement, generated: two paradigms in turn."""

from __future__ import annotations

import json
from pathlib import Path

NOUNS = ("cat", "dog", "teacher", "car", "house", "child", "river", "book", "student", "tree")
ENDS = ("here", "in the house", "very old", "near the river that we saw last year")


def made_pairs(number: int) -> list[dict[str, str]]:
    """``number`` records as in BLiMP, of unlike lengths."""
    records = []
    for n in range(number):
        noun, end = NOUNS[n // 2 % len(NOUNS)], ENDS[n // 2 % len(ENDS)]
        if n % 2:
            good, bad, kind = f"There is a {noun} {end}.", f"There is an {noun}s {end}.", "number"
        else:
            good, bad, kind = f"The {noun} is {end}.", f"The {noun} are {end}.", "agreement"
        record = {"sentence_good": good, "sentence_bad": bad, "paradigm": kind, "field": "syntax"}
        records.append(record)
    return records


def write_pairs(path: Path, records: list[dict[str, str]]) -> Path:
    """The records as a file of JSON lines."""
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
