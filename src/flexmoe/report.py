"""Tables on the screen and plots as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import torch

matplotlib.use("Agg")  # files only: no display needed

import matplotlib.pyplot as plt
from rich.table import Table

from flexmoe.plan import Plan

Row = Mapping[str, Any]


def size(number: float) -> str:
    """Bytes for people: 4.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"


def count(number: float) -> str:
    """A count for people: 1.57 M."""
    for unit in ("", " k", " M"):
        if number < 1000:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} B"


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"


def merge_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One row a budget from rows of several data files: the mean of their losses (each file counts
    the same) and its perplexity."""
    merged = []
    for pruned in dict.fromkeys(row["pruned"] for row in rows):
        same = [row for row in rows if row["pruned"] == pruned]
        nll = sum(row["nll"] for row in same) / len(same)
        merged.append({**same[0], "nll": nll, "perplexity": float(torch.tensor(nll).exp())})
    return merged


def budget_table(rows: Sequence[Row], title: str) -> Table:
    """Pruned share, routed parameters, bytes, loss, perplexity and its change to the first row;
    a column more for the rows' ``name`` where they have one."""
    named = any("name" in row for row in rows)
    table = Table(title=title, title_justify="left")
    if named:
        table.add_column("")
    for name in ("pruned", "routed parameters", "size", "loss", "perplexity", "change"):
        table.add_column(name, justify="right")
    for row in rows:
        change = row["perplexity"] / rows[0]["perplexity"] - 1
        table.add_row(
            *([row.get("name", "")] if named else []),
            _percent(row["pruned"]),
            count(row["routed_parameters"]),
            size(row["bytes"]),
            f"{row['nll']:.3f}",
            f"{row['perplexity']:.2f}",
            "" if row is rows[0] else f"{change:+.1%}",
        )
    return table


def plot_quality(curves: Mapping[str, Sequence[Row]], path: Path, title: str) -> None:
    """Loss against bytes, a line per curve; the share pruned is written at the points of the
    first."""
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for number, (name, rows) in enumerate(curves.items()):
        x, y = [row["bytes"] / 1e6 for row in rows], [row["nll"] for row in rows]
        width, alpha = (2.2, 1.0) if number == 0 else (1.2, 0.7)
        axes.plot(x, y, marker="o", markersize=4, label=name, linewidth=width, alpha=alpha)
        for row, a, b in zip(rows, x, y, strict=True) if number == 0 else ():
            share = f"{row['pruned']:.0%}"
            axes.annotate(share, (a, b), (0, -13), textcoords="offset points", ha="center", size=8)
    axes.set_xlabel("size of all tensors (MB)")
    axes.set_ylabel("held-out loss (nats per token)")
    axes.set_title(title)
    axes.margins(y=0.12)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False)
    _save(figure, path)


def plot_widths(plan: Plan, pruned: float, path: Path) -> None:
    """Map of the widths at one budget: a row a MoE layer, a column an expert, in shares of the
    full width."""
    widths = plan.widths(pruned)
    experts = max(layer.experts for layer in plan.layers.values())
    share_LE = torch.full((len(widths), experts), float("nan"))
    for row, (i, width_E) in enumerate(sorted(widths.items())):
        share_LE[row, : len(width_E)] = width_E / plan.layers[i].channels
    height = min(12.0, max(2.2, 1.4 + 0.28 * len(widths)))
    figure, axes = plt.subplots(figsize=(min(16.0, 3 + 0.3 * experts), height))
    image = axes.imshow(share_LE, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xlabel("expert")
    axes.set_ylabel("decoder layer")
    axes.set_yticks(range(len(widths)), [str(i) for i in sorted(widths)])
    axes.set_title(f"channels kept at {pruned:.0%} pruned ({plan.recipe.allocate})")
    figure.colorbar(image, ax=axes, label="share of channels kept")
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
