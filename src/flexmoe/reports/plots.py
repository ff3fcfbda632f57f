"""Plots: figures that are saved as PNG or stand in a page as SVG."""

from __future__ import annotations

import re
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import torch
from cycler import cycler
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.records import Curve, Point
from flexmoe.plan import Plan
from flexmoe.reports.report import Row, percent
from flexmoe.reports.sizes import GONE

INK = "#14171a"  # of text and axes; in a page the colour of its text
COLORS = ("#3b82c4", "#d9762b", "#3a9a5b", "#c44e7a", "#8a6fc9", "#8c7a3b")  # on light and dark
MARKERS = "osD^vP"
FEW = 8  # lines that are all named where they end
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "flexmoe",  # the same figure is the same text
    "text.parse_math": False,  # a $ in a file's name is a $
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.prop_cycle": cycler(color=COLORS),
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "axes.titlecolor"), INK),
}
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def check_plot(path: Path) -> None:
    """`FlexmoeError` unless the ending of ``path`` names a kind of picture."""
    known = sorted(Figure().canvas.get_supported_filetypes())
    if path.suffix.lower().removeprefix(".") not in known:
        raise FlexmoeError(
            f"cannot draw a plot as '{path}': its ending is '{path.suffix}', expected one such as "
            f"{path.stem}.png (known: {', '.join(known)})"
        )


def save(figure: Figure, path: Path, title: str = "") -> None:
    """Write a figure on white, under a title, as the kind of picture that its ending says."""
    with matplotlib.rc_context(STYLE):
        if title:
            figure.suptitle(textwrap.fill(title, 80), fontsize=9)
        figure.savefig(path, dpi=150, facecolor="white")


def svg(figure: Figure) -> str:
    """A figure as an SVG element for a page: nothing around it, text in the page's colour, the
    width the page gives it."""
    text = StringIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts draw the text
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    found = text.getvalue()
    found = found[found.index("<svg") :]
    found = re.sub(r"<metadata>.*?</metadata>", "", found, flags=re.DOTALL)
    found = re.sub(r'<g id="[^"]*">', "<g>", found)  # several figures share a page
    found = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", found, count=1)
    found = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", found, count=1)
    return found.replace(INK, "currentColor").strip()


# --- the report ----------------------------------------------------------------------------------


def quality_figure(points: Sequence[Point]) -> Figure:
    """Increase of the loss with its interval against bytes, a point a budget."""
    scale, unit = _unit(max(point.bytes for point in points))
    x = [point.bytes / scale for point in points]
    y = [point.increase for point in points]
    spread = [point.increase_interval or (point.increase,) * 2 for point in points]
    below = [a - s[0] for a, s in zip(y, spread, strict=True)]
    above = [s[1] - a for a, s in zip(y, spread, strict=True)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.6))
        axes = figure.subplots()
        axes.errorbar(x, y, [below, above], marker="o", markersize=5, capsize=3, linewidth=2)
        for point, a, b in zip(points, x, y, strict=True):
            axes.annotate(percent(point.pruned), (a, b), (6, 6), textcoords="offset points", size=9)
        axes.set_xlabel(f"size of all tensors ({unit})")
        axes.set_ylabel("loss increase (nats per token)")
        axes.margins(x=0.08, y=0.12)
        axes.grid(alpha=0.25)
    return figure


def domains_figure(curve: Curve) -> Figure:
    """Increase of the loss on each data file, against the share pruned."""
    x = [100 * point.pruned for point in curve.budgets]
    increases = [curve.increases(point) for point in curve.budgets]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 3.6))
        axes = figure.subplots()
        for number, name in enumerate(increases[0]):
            y = [of[name] for of in increases]
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(x, y, marker=marker, markersize=5, linewidth=1.8)
        axes.set_xlabel("pruned (% of the routed-expert parameters)")
        axes.set_ylabel("loss increase (nats per token)")
        axes.grid(alpha=0.25)
        axes.legend(axes.lines, map(_shortened, increases[0]))  # a name may begin with _
    return figure


def _shortened(name: str) -> str:
    """A name with at most 40 characters: its beginning and its end."""
    return name if len(name) <= 40 else f"{name[:20]}…{name[-19:]}"


def pareto_figure(rows: Sequence[Row]) -> Figure:
    """Increase of the loss against the share pruned, a line a method of `comparison.Results`; those
    that no other one beats are named: smaller at no higher loss, or better at no larger size."""
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for row in rows:
        if row["increase"] is not None:
            point = (100 * row["achieved"], row["increase"], row["unit"])
            lines.setdefault(row["method"], []).append(point)
    points = [(x, y, name) for name, line in lines.items() for x, y, _ in line]
    front = [(x, y, name) for x, y, name in points if not _beaten((x, y), points)]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7, 4.6))
        axes = figure.subplots()
        few = len(lines) <= FEW
        for name, line in lines.items():
            xs, ys, units = zip(*sorted(line), strict=True)
            random = name.startswith("random")
            axes.plot(
                xs, ys, marker="o", markersize=3, color=COLORS[units[0] == "expert"], alpha=0.6,
                linestyle="--" if random else "-", linewidth=1.8 if random else 0.8,
            )  # fmt: skip
            if random or few:
                at = (xs[-1], ys[-1])
                axes.annotate(name, at, (6, 0), textcoords="offset points", size=8)
        for x, y, name in front:
            axes.plot([x], [y], marker="o", markersize=7, color=COLORS[2])
            if not few:
                axes.annotate(name, (x, y), (6, -12), textcoords="offset points", size=8)
        for number, label in enumerate(("channels", "whole experts", "beaten by none")):
            axes.plot([], [], marker="o", color=COLORS[number], linewidth=0, label=label)
        if all(y > 0 for _, y, _ in points):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("pruned (% of the routed-expert parameters)")
        axes.set_ylabel("loss increase (nats per token)")
        axes.margins(x=0.25, y=0.1)
        axes.grid(alpha=0.25)
        axes.legend(loc="upper left", fontsize=9)
    return figure


def _beaten(of: tuple[float, float], points: Sequence[tuple[float, float, str]]) -> bool:
    return any(x >= of[0] and y <= of[1] and (x, y) != of for x, y, _ in points)


def parts_figure(parts: Mapping[str, Sequence[int]], budgets: Sequence[float]) -> Figure:
    """Bytes of each part of the model at each budget, a stacked bar a budget."""
    scale, unit = _unit(max(map(sum, zip(*parts.values(), strict=True))))
    names = [percent(share) for share in budgets]
    colors = dict(zip(parts, COLORS, strict=False))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6, 1.8 + 0.34 * len(budgets)))
        axes = figure.subplots()
        left = [0.0] * len(budgets)
        for name, sizes in parts.items():
            wide = [size / scale for size in sizes]
            gone = name == GONE
            axes.barh(
                names, wide, left=left, label=name, height=0.7,
                color="none" if gone else colors[name],
                edgecolor=INK if gone else "none", linewidth=0.8,
                hatch="////" if gone else None, alpha=0.5 if gone else 1.0,
            )  # fmt: skip
            left = [a + b for a, b in zip(left, wide, strict=True)]
        axes.invert_yaxis()
        axes.set_xlabel(f"size ({unit})")
        axes.set_ylabel("pruned")
        figure.legend(loc="outside lower center", ncols=2, fontsize=9)
    return figure


def map_figure(values: Mapping[int, Tensor], label: str, most: float | None = None) -> Figure:
    """A map of a number of each expert: values [E] by layer, a row a layer. ``most`` is the value
    at the end of the colour scale."""
    columns = max(len(value_E) for value_E in values.values())
    value_LE = torch.full((len(values), columns), float("nan"))
    for row, (_, value_E) in enumerate(sorted(values.items())):
        value_LE[row, : len(value_E)] = value_E
    layers = sorted(values)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5, min(4.6, max(1.9, 1.1 + 0.13 * len(layers)))))
        axes = figure.subplots()
        image = axes.imshow(
            value_LE, vmin=0, vmax=most, cmap="viridis", aspect="auto", interpolation="none"
        )
        axes.spines[:].set_visible(False)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer")
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        every = -(-len(layers) // 12)  # at most a dozen numbers fit
        axes.set_yticks(range(0, len(layers), every), [str(i) for i in layers[::every]])
        figure.colorbar(image, ax=axes, label=label)
    return figure


def widths_figure(plan: Plan, pruned: float) -> Figure:
    """Map of the widths at one budget, in shares of the full width."""
    return map_figure(kept_shares(plan, pruned), "kept", most=1.0)


def kept_shares(plan: Plan, pruned: float) -> dict[int, Tensor]:
    """The share of its channels that each expert keeps, [E] by layer."""
    return {i: width_E / plan.layers[i].channels for i, width_E in plan.widths(pruned).items()}


def _unit(most: float) -> tuple[float, str]:
    return next((scale, unit) for scale, unit in UNITS if most >= scale)


# --- the demo ------------------------------------------------------------------------------------


def plot_quality(curves: Mapping[str, Sequence[Row]], path: Path, title: str) -> None:
    """Loss against bytes, a line per curve; the share pruned is written at the points of the
    first."""
    figure = Figure(figsize=(7, 4.2))
    axes = figure.subplots()
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
    figure.tight_layout()
    save(figure, path)
