"""What an evaluation found, as tables for the screen."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.table import Table

from flexmoe.evaluation.evaluate import Measured, perplexity
from flexmoe.reports.report import count, percent, size

Row = Mapping[str, Any]


def tables(done: Measured, title: str) -> Iterator[Table]:
    """All that was measured: text, text by file where there are several, and what else there is."""
    base = [] if done.against is None else [done.against]
    rows: list[Row] = [*base, *done.members]
    files = list(rows[0]["files"])
    yield _text(rows, f"{title} on {', '.join(files)}")
    if compared := [row for row in rows if _is_compared(row)]:
        yield _distance(compared)
    if any("work" in row for row in rows):
        yield _work(rows)
    if len(files) > 1:
        yield _by_file(rows, files)
    about = done.about
    if (pairs := about["pairs"]) is not None:
        yield _pairs(rows, f"{pairs['name']}, {rows[-1]['pairs']['n']} pairs")
    if about["tasks"] is not None:
        yield _tasks(rows)
    if (of := about["generation"]) is not None:
        for mode in of["settings"]:
            title = f"{of['n']} answers of at most {of['max_new_tokens']} tokens, {mode}"
            yield _generation(rows, mode, title)
    if (of := about["structured"]) is not None:
        yield _structured(rows, f"{of['name']}, {of['n']} answers")


def _text(rows: Sequence[Row], title: str) -> Table:
    """Of each budget its size and loss; where there is a base, the increase over it and the share
    of the likelihood a token that is kept."""
    table = _table(title, "pruned", "routed", "size", "loss", "perplexity", "increase", "kept")
    for row in rows:
        cells = [count(row["routed_parameters"]), size(row["bytes"])]
        cells += [f"{row['nll']:.3f}", f"{perplexity(row['nll']):.2f}"]
        if _is_compared(row):
            increase = f"{row['increase']:+.3f}{half(row['increase_interval'])}"
            cells += [increase, f"{row['kept']:.1%}"]
        table.add_row(_name(row), *cells)
    return table


def _distance(rows: Sequence[Row]) -> Table:
    """How far the predictions of each budget are from the base's."""
    table = _table("predictions beside the base's", "pruned", "KL", "same top-1")
    for row in rows:
        kl = f"{row['kl']:.4f}{half(row['kl_interval'], 4)}"
        agreement = f"{row['agreement']:.4f}{half(row['agreement_interval'], 4)}"
        table.add_row(_name(row), kl, agreement)
    return table


def _work(rows: Sequence[Row]) -> Table:
    """What experts computed of what the routers asked for, at full width."""
    table = _table("what is computed", "pruned", "pairs", "channels")
    for row in rows:
        if "work" in row:
            cells = [f"{row['work'][name]:.1%}" for name in ("pairs", "channels")]
            table.add_row(_name(row), *cells)
    return table


def _by_file(rows: Sequence[Row], files: Sequence[str]) -> Table:
    """Loss by data file; where there is a base, the increase over it."""
    table = _table("loss by file, or its increase", "pruned", *files)
    for row in rows:
        cells = []
        for of in map(row["by_file"].get, files):
            if _is_compared(row):
                cells.append(f"{of['increase']:+.3f}{half(of['increase_interval'])}")
            else:
                cells.append(f"{of['nll']:.3f}")
        table.add_row(_name(row), *cells)
    return table


def _pairs(rows: Sequence[Row], title: str) -> Table:
    """Of each budget its accuracy; where there is a base, the ratio to it, of all and of what is
    above chance."""
    table = _table(title, "pruned", "right", "of the base's", "of its margin above chance")
    for row in rows:
        of, cells = row["pairs"], []
        for name, spread in (
            ("accuracy", "interval"),
            ("ratio", "ratio_interval"),
            ("margin_ratio", "margin_ratio_interval"),
        ):
            known = of[name] is not None and (_is_compared(row) or name == "accuracy")
            cells.append(f"{of[name]:.3f}{half(of[spread])}" if known else "")
        table.add_row(_name(row), *cells)
    return table


def _tasks(rows: Sequence[Row]) -> Table:
    """The first metric of every task, and the ratio to the base's."""
    table = _table("tasks", "task", "pruned", "metric", "documents", "value", "of the base's")
    for name in rows[0]["tasks"]:
        for row in rows:
            of = row["tasks"][name]
            value = f"{of['value']:.3f}{half(of['interval'])}"
            ratio = ""
            if _is_compared(row) and of["ratio"] is not None:
                ratio = f"{of['ratio']:.3f}{half(of['ratio_interval'])}"
            table.add_row(name, _name(row), of["metric"], str(of["n"]), value, ratio)
    return table


def _generation(rows: Sequence[Row], mode: str, title: str) -> Table:
    """Shares of answers that loop or never end, and their mean length."""
    table = _table(title, "pruned", "loop", "never end", "either", "tokens")
    for row in rows:
        of = row["generation"][mode]
        shares = [_share(of[name]) for name in ("looped", "endless", "either")]
        table.add_row(_name(row), *shares, f"{of['tokens']:.0f}")
    return table


def _structured(rows: Sequence[Row], title: str) -> Table:
    """Shares of answers that are JSON, or calls that fit."""
    table = _table(title, "pruned", "valid", "JSON", "tool calls")
    for row in rows:
        of = row["structured"]
        table.add_row(_name(row), *(_share(of[name]) for name in ("valid", "text", "tools")))
    return table


def _is_compared(row: Row) -> bool:
    """Whether there is a base to say something of, and the row is not the base itself."""
    return "increase" in row and (row["pruned"] or row["increase"] != 0)


def _name(row: Row) -> str:
    return row["model"] if "model" in row else percent(row["pruned"])


def _share(of: Row | None) -> str:
    if of is None:
        return ""
    share, low, high = (_percent(value) for value in (of["share"], *of["interval"]))
    return f"{share}% ({low} to {high})"


def _percent(share: float) -> str:
    return f"{100 * share:.0f}" if share >= 0.1 else f"{100 * share:.1f}"


def half(spread: Sequence[float] | None, digits: int = 3) -> str:
    """An interval behind its number: half of its width."""
    return "" if spread is None else f" ±{(spread[1] - spread[0]) / 2:.{digits}f}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    return table
