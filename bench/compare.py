"""The frozen comparison: all methods on the shipped model at 20, 40 and 60 %, each with the
allocation and the router rule of its paper, and some with others.

    python bench/compare.py            # writes results/compare.json (about an hour on one core)

What was measured is kept in results/compare.jsonl: a run that was killed goes on, and methods that
are new are measured without the others.
"""

from __future__ import annotations

from common import RESULTS, save
from flexmoe.comparison.inputs import CompareConfig
from flexmoe.comparison.run import compare
from flexmoe.comparison.tables import as_good, best_first, budgets
from flexmoe.progress import bar

KEPT = RESULTS / "compare.jsonl"
SHARES = (0.2, 0.4, 0.6)
OTHERS = (
    "fisher@global", "fisher@layer", "fisher@uniform", "heapr@layer", "camera@global",
    "reap+keep", "reap+constant", "mone+keep", "mone+remove", "random-experts+keep",
    "tenp@layer", "seap@layer", "moe-slimming@layer", "rco+keep",
)  # fmt: skip
CONFIG = CompareConfig(
    methods=("all", *OTHERS), pruned=SHARES, samples=128, seq_len=256, eval_samples=24
)


def main() -> None:
    left_out: list[str] = []
    results = compare("tiny", KEPT, CONFIG, say=left_out.append, track=bar)
    rows = []
    for share in budgets(results):
        good = as_good(best_first(results, share))
        for row in best_first(results, share):
            short = {key: value for key, value in row.items() if key not in ("windows", "by_file")}
            rows.append(short | {"as_good_as_the_best": row["method"] in good})
    base = {k: v for k, v in (results.base or {}).items() if k not in ("windows", "by_file")}
    save(
        "compare",
        {"settings": results.settings, "left_out": left_out, "base": base, "rows": rows},
    )


if __name__ == "__main__":
    main()
