"""The frozen comparison: all methods on the shipped model at 20, 40 and 60 %, each with the
allocation and the router rule of its paper, and some with others.

    python bench/compare.py            # writes results/compare.json (about an hour on one core)

What results/compare.json has is not measured again: methods that are new are added to it, with
what they were measured on. What was measured is kept in work/compare.jsonl until then, so that a
run that was killed goes on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, environment, save
from flexmoe.comparison.inputs import CompareConfig
from flexmoe.comparison.results import FORMAT, Row
from flexmoe.comparison.run import compare
from flexmoe.comparison.tables import as_good, best_first, budgets
from flexmoe.progress import bar

BEFORE = RESULTS / "compare.json"
WORK = Path(__file__).parent / "work" / "compare.jsonl"
SHARES = (0.2, 0.4, 0.6)
OTHERS = (
    "fisher@global", "fisher@layer", "fisher@uniform", "heapr@layer", "camera@global",
    "reap+keep", "reap+constant", "mone+keep", "mone+remove", "random-experts+keep",
    "tenp@layer", "seap@layer", "moe-slimming@layer",
)  # fmt: skip
CONFIG = CompareConfig(
    methods=("all", *OTHERS), pruned=SHARES, samples=128, seq_len=256, eval_samples=24
)
LONG = ("windows", "by_file")  # of a row, not kept in results/


def main() -> None:
    before: dict[str, Any] = json.loads(BEFORE.read_text()) if BEFORE.is_file() else {}
    if before and not WORK.is_file():
        WORK.parent.mkdir(exist_ok=True)
        lines = [{"format": FORMAT, "settings": before["settings"]}, before["base"]]
        WORK.write_text("".join(json.dumps(line) + "\n" for line in lines + before["rows"]))
    left_out: list[str] = []
    results = compare("tiny", WORK, CONFIG, say=left_out.append, track=bar)
    rows = []
    for share in budgets(results):
        ranked = best_first(results, share)
        good = stars(ranked)
        for row in ranked:
            short = {key: value for key, value in row.items() if key not in LONG}
            rows.append(short | {"as_good_as_the_best": row["method"] in good})
    base = {k: v for k, v in (results.base or {}).items() if k not in LONG}
    later = before.get("later", [])
    known = {name for part in later for name in part["methods"]}
    measured = (row["method"] for row in results.rows if "windows" in row)
    added = [name for name in dict.fromkeys(measured) if name not in known]
    result = {"settings": results.settings, "left_out": left_out, "base": base, "rows": rows}
    if before:
        new = [{"environment": environment(), "methods": added}] if added else []
        result |= {"environment": before["environment"], "later": later + new}
    save("compare", result)


def stars(ranked: list[Row]) -> set[str]:
    """The methods that cannot be told from the best one. Of those that were measured before the
    windows are gone: they keep what was found then, and new ones are told by their intervals."""
    if all("windows" in row for row in ranked):
        return as_good(ranked)
    if "windows" in ranked[0]:
        sys.exit(f"{ranked[0]['method']} is the best now: remove results/compare.json, run again")
    reach = ranked[0]["increase_interval"][1]
    return {
        row["method"]
        for row in ranked
        if row.get("as_good_as_the_best", row["increase_interval"][0] <= reach)
    }


if __name__ == "__main__":
    main()
