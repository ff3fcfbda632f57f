"""Writes docs/methods.md from the code: ``python docs/methods.py``."""

from __future__ import annotations

from pathlib import Path

from flexmoe.methods import Method, all_methods

PAGE = Path(__file__).with_suffix(".md")
INTRO = """\
# Scoring methods

Written by `python docs/methods.py` from the code, where each method is one file
(`src/flexmoe/methods/`) with its formula and where it departs from its paper's code.
`flexmoe compress --method NAME` uses one, `flexmoe score` writes its raw numbers.

*passes*: how often it goes through the calibration text; one pass serves all methods of
`flexmoe score` together. *cost*: what a pass takes; backward includes forward, training is many of
them. *rule*: how it
allocates unless `--allocate` says otherwise, as in its paper or as near as an allocator comes.
*router*: what the paper does with it (`compress --router`, `compare`; [rules](compare.md)).
"""
TITLES = {
    "channel": "Channels, score `[E, I]`: experts become narrower",
    "expert": "Whole experts, score `[E]`: they stay or go",
}
HEAD = "| method | score | passes | cost | rule | router | paper |\n|---|---|---|---|---|---|---|\n"


def row(method: Method) -> str:
    summary = method.summary.removesuffix(".")
    how = (method.passes, method.cost, method.allocate, method.router)
    cells = (f"`{method.name}`", summary, *how, method.paper)
    return "| " + " | ".join(map(str, cells)) + " |\n"


def page() -> str:
    text = INTRO
    for unit, title in TITLES.items():
        found = sorted((m for m in all_methods().values() if m.unit == unit), key=lambda m: m.name)
        text += f"\n## {title}\n\n{HEAD}" + "".join(map(row, found))
    return text


if __name__ == "__main__":
    PAGE.write_text(page())
