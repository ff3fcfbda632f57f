"""The results of a comparison for people: a table a budget, on the screen or in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Table

from flexmoe.comparison.results import Results
from flexmoe.evaluation.intervals import interval, resampled_means
from flexmoe.evaluation.tables import half
from flexmoe.memory import gib
from flexmoe.reports.report import count, percent

Row = Mapping[str, Any]
SEED = 0  # of resampling


def budgets(results: Results) -> list[float]:
    """The pruned shares that were measured, rising."""
    return sorted({row["pruned"] for row in results.rows})


def best_first(results: Results, pruned: float) -> list[Row]:
    """The lines of one budget, smallest increase of the loss first; those that are not finite
    last."""
    rows = [row for row in results.rows if row["pruned"] == pruned]
    return sorted(rows, key=lambda row: (row["increase"] is None, row["increase"] or 0.0))


def as_good(rows: Sequence[Row]) -> set[str]:
    """The entries of one budget that cannot be told from the best: the 95 % interval of the
    difference of their losses, window by window on the same draws, holds 0. Empty where there are
    too few windows to say."""
    rows = [row for row in rows if row["increase"] is not None]
    if not rows:
        return set()
    files = [np.stack([row["windows"][name] for row in rows], 1) for name in rows[0]["files"]]
    drawn_RB = resampled_means(files, [1 / len(files)] * len(files), seed=SEED)
    best = min(range(len(rows)), key=lambda b: rows[b]["increase"])
    found = set()
    for b, row in enumerate(rows):
        spread = interval(drawn_RB[:, b] - drawn_RB[:, best])
        if spread is not None and (b == best or spread[0] <= 0):
            found.add(row["method"])
    return found


Cells = tuple[list[str], list[list[str]]]  # head, and a line an entry


def quality(results: Results, pruned: float) -> Cells:
    """How good each entry is at one budget, best first. A star marks those that cannot be told from
    the best; ``active`` are the routed parameters that a token meets."""
    rows = best_first(results, pruned)
    good = as_good(rows)
    with_pairs = any(row.get("pairs") for row in rows)
    head = ["method", "allocate", "router", "pruned", "active", "increase"] + ["pairs"] * with_pairs
    cells = []
    for row in rows:
        shown = [row["method"] + "*" * (row["method"] in good), row["allocate"], row["router"]]
        shown += [percent(round(row["achieved"], 4)), count(row["active_parameters"])]
        shown.append(_with_half(row["increase"], row["increase_interval"]))
        if with_pairs:
            of = row.get("pairs")
            shown.append("" if of is None else _right(of["accuracy"], of["interval"]))
        cells.append(shown)
    return head, cells


def by_file(results: Results, pruned: float) -> Cells:
    """Increase of the loss on each held-out file at one budget, best first."""
    rows = best_first(results, pruned)
    files = list(rows[0]["files"])
    found = []
    for row in rows:
        of = [row["by_file"][name] for name in files]
        found.append(
            [row["method"], *(_with_half(f["increase"], f["increase_interval"]) for f in of)]
        )
    return ["method", *files], found


def cost(results: Results) -> Cells:
    """What each entry took, most first."""
    entries = {row["method"]: row for row in results.rows}.values()
    head = ["method", "looks at", "its pass", "shared by", "plan", "most memory"]
    cells = []
    for row in sorted(entries, key=lambda row: -row["plan_seconds"]):
        of = row["calibration"]
        shown = [row["method"], of["cost"], _seconds(of["seconds"]), str(of["shared_by"])]
        cells.append([*shown, _seconds(row["plan_seconds"]), gib(of["most_held"])])
    return head, cells


def titled(results: Results) -> Iterator[tuple[str, Cells]]:
    """All tables, each with its title."""
    for share in budgets(results):
        yield f"{percent(share)} pruned", quality(results, share)
    for share in budgets(results):
        if len(results.settings["evaluation"]) > 1:
            yield f"{percent(share)} pruned: increase by file", by_file(results, share)
    if results.rows:
        yield "what it took", cost(results)


def note(results: Results) -> str:
    """What the numbers of all tables are of."""
    of, base = results.settings, results.base or {}
    tokens = sum(f["windows"] * (f["seq_len"] - 1) for f in of["evaluation"].values())
    read = of["calibration"]
    text = (
        f"Base loss {base.get('nll') or float('nan'):.4f}; increase in nats per token over "
        f"{tokens:,} held-out tokens, ± half of a 95 % interval, * not to be told from the best; "
        f"calibration {read['windows']} windows of {read['seq_len']} tokens, its pass shared by "
        "methods of the same cost; most memory: held by the process in that pass"
    )
    if (pairs := base.get("pairs")) is not None:
        text += f"; pairs: share right of {pairs['n']}, base {_right(pairs['accuracy'])}"
    return text


def screen(results: Results) -> Iterator[Table]:
    """All tables for the screen."""
    for title, (head, cells) in titled(results):
        shown = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
        for number, name in enumerate(head):
            words = number == 0 or name in ("allocate", "router", "looks at")
            shown.add_column(name, justify="left" if words else "right", no_wrap=number == 0)
        for row in cells:
            shown.add_row(*row)
        yield shown


def markdown(results: Results) -> str:
    """All tables and what they are of as Markdown."""
    parts = [f"# {results.settings['model']}: methods compared\n", f"{note(results)}.\n"]
    for title, (head, cells) in titled(results):
        lines = [head, ["---"] * len(head), *cells]
        body = "\n".join(f"| {' | '.join(line)} |".replace("*", r"\*") for line in lines)
        parts.append(f"## {title}\n\n{body}\n")
    return "\n".join(parts)


def _with_half(value: float | None, spread: Sequence[float] | None) -> str:
    return "not finite" if value is None else f"{value:+.3f}{half(spread)}"


def _right(share: float | None, spread: Sequence[float] | None = None) -> str:
    return "not finite" if share is None else f"{share:.3f}{half(spread)}"


def _seconds(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
