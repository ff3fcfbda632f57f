"""The report of a family: one HTML page that needs nothing else, and its plots.

Every number is from the family's plan, its measured curve or its files. All text that comes from
data is escaped.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template

from matplotlib.figure import Figure

from flexmoe.coverage import coverage
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.curve import command, load_curve, stale
from flexmoe.evaluation.evaluate import perplexity
from flexmoe.evaluation.records import Curve
from flexmoe.evidence import Evidence
from flexmoe.files import refuse_existing, write_whole, written_beside
from flexmoe.plan import Plan, Recipe, read_manifest
from flexmoe.progress import Track, silent
from flexmoe.reports.plots import (
    domains_figure,
    kept_shares,
    map_figure,
    parts_figure,
    quality_figure,
    save,
    svg,
    widths_figure,
)
from flexmoe.reports.provenance import Record, commands
from flexmoe.reports.report import MEASURES, count, figure, measured_rows, percent, ranging, size
from flexmoe.reports.samples import Sample
from flexmoe.reports.sizes import parts
from flexmoe.statistics import THIN

TEMPLATE = Path(__file__).with_name("page.html")


@dataclass
class Page:
    """Sections of HTML by title, in order, and the figures in them with their captions, by name."""

    title: str
    summary: str
    sections: dict[str, str] = field(default_factory=dict)
    figures: dict[str, tuple[Figure, str]] = field(default_factory=dict)

    def figure(self, name: str, drawn: Figure, alt: str, caption: str) -> str:
        """The HTML of a figure; ``alt`` says in words what is to be seen."""
        self.figures[name] = drawn, caption
        return (
            f'<figure><div role="img" aria-label="{_text(alt)}">{svg(drawn)}</div>'
            f"<figcaption>{_text(caption)}</figcaption></figure>"
        )

    def html(self) -> str:
        """The whole page."""
        names = {title: title.lower().replace(" ", "-") for title in self.sections}
        return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
            title=_text(self.title),
            summary=self.summary,
            contents="\n".join(f'<li><a href="#{n}">{t}</a></li>' for t, n in names.items()),
            sections="\n".join(
                f'<section id="{names[title]}"><h2>{title}</h2>\n{content}\n</section>'
                for title, content in self.sections.items()
            ),
        )

    def write(self, out: str | Path) -> list[Path]:
        """Write ``out``, a page FILE.html, or a folder with report.html and every figure as PNG;
        returns the files. Whole or not at all."""
        out = Path(out).expanduser()
        if out.suffix == ".html":
            refuse_existing(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            write_whole(out, self.html().encode())
            names = [out]
        else:
            with written_beside(out) as folder:
                (folder / "report.html").write_text(self.html(), encoding="utf-8")
                for name, (drawn, caption) in self.figures.items():
                    save(drawn, folder / f"{name}.png", f"{self.title}. {caption}")
                names = [out / file.name for file in sorted(folder.iterdir())]
        return names


def measured_curve(family: str | Path, track: Track = silent) -> Curve:
    """The curve that a report is made of; a `FlexmoeError` if there is none that holds."""
    read_manifest(family)  # says what is wrong with a folder that is none
    curve = load_curve(family)
    if curve is None:
        raise FlexmoeError(
            f"'{family}' has no measured curve to report: make it with {command(family)}"
        )
    if reason := stale(curve, family, track):
        raise FlexmoeError(f"{reason}: measure again with {command(family, again=curve)}")
    return curve


def build_page(
    family: str | Path,
    curve: Curve,
    *,
    weights: str | Path | None = None,
    samples: Sequence[Sample] = (),
    evidence: Evidence | None = None,
) -> Page:
    """The page of a family or plan and its measured ``curve``.

    ``weights``: the folder with the checkpoint, None for a plan whose base model is not at hand.
    Without the ``evidence`` that the plan rests on the page shows what the plan says of it, the
    experts that saw too few tokens.
    """
    plan = Plan.load(family)
    recipe = plan.recipe
    name = Path(recipe.base_model).name
    poorest = curve.budgets[-1]
    page = Page(
        f"{name}: what pruning costs",
        f"<p>{_text(recipe.base_model)} as a family of sizes. At {percent(poorest.pruned)} pruned, "
        f"the smallest that was measured, {size(poorest.bytes)} of "
        f"{size(plan.bytes_full)} are left and {poorest.kept:.1%} of the likelihood per token. "
        "<em>Pruned</em> is a share of the routed-expert parameters.</p>",
    )
    page.sections["Quality against size"] = _quality(page, curve)
    page.sections["Loss by data file"] = _domains(page, curve)
    if others := _others(curve):
        page.sections["Other measures"] = others
    page.sections["Widths"] = _widths(page, plan, curve)
    page.sections["Where parameters and bytes went"] = _parts(page, plan, weights, curve)
    page.sections["Coverage"] = _coverage(page, plan, evidence)
    if samples:
        page.sections["Samples"] = _samples(samples)
    page.sections["How it was made"] = _made(recipe, curve)
    return page


# --- sections ------------------------------------------------------------------------------------


def _quality(page: Page, curve: Curve) -> str:
    rows = [
        (
            percent(point.pruned),
            f"{point.achieved:.2%}",
            size(point.bytes),
            figure(point.nll),
            figure(perplexity(point.nll)),
            figure(point.increase) + ranging(point.increase_interval),
            figure(point.kept) + ranging(point.kept_interval),
        )
        for point in curve.budgets
    ]
    head = ("pruned", "exactly", "size", "loss", "perplexity", "loss increase", "likelihood kept")
    files = ", ".join(
        f"{name} ({file.windows} windows of {file.seq_len} tokens)"
        for name, file in curve.files.items()
    )
    versions = ", ".join(f"{name} {version}" for name, version in curve.versions.items())
    alt = "Loss increase against size: " + "; ".join(
        f"{percent(p.pruned)} pruned, {size(p.bytes)}: {figure(p.increase)}" for p in curve.budgets
    )
    return (
        page.figure(
            "quality",
            quality_figure(curve.budgets),
            alt,
            f"Increase of the held-out loss over {curve.base}; bars are 95 % intervals over the "
            "choice of text, labels the share pruned.",
        )
        + _table(head, rows, "Every budget that was measured")
        + f"<p>On {_text(files)}. Measured {_text(curve.date)} in {_text(curve.dtype)} on "
        f"{_text(curve.hardware)}; {_text(versions)}. Loss in nats per token, the mean over "
        "files; likelihood kept is exp(-increase). Sizes are those of ragged exports.</p>"
    )


def _domains(page: Page, curve: Curve) -> str:
    points, names = curve.budgets, list(curve.budgets[0].files)
    head = ("file", *(percent(point.pruned) for point in points))
    rows = [(name, *(figure(point.files[name]) for point in points)) for name in names]
    alt = f"Loss increase by file at {percent(points[-1].pruned)} pruned: " + "; ".join(
        f"{name} {figure(increase)}" for name, increase in curve.increases(points[-1]).items()
    )
    caption = f"Increase of the loss over {curve.base} on each file"
    drawn = page.figure("domains", domains_figure(curve), alt, caption)
    table = _table(head, rows, "Loss (nats per token) on each file, by share pruned")
    more = measured_rows([point.model_dump().get("by_file") or {} for point in points])
    if more:
        with_spread = [(name, *cells) for name, cells in more.items()]
        table += _table(head, with_spread, f"Each file in full. {MEASURES}")
    return drawn + table


def _others(curve: Curve) -> str:
    """All that a curve holds beside the loss: what is there, by name."""
    skip = ("nll", "nll_interval", "increase", "kept", "files", "by_file")
    rows = measured_rows([point.model_dump() for point in curve.budgets], skip)
    head = ("measure", *(percent(point.pruned) for point in curve.budgets))
    shown = [(name, *cells) for name, cells in rows.items()]
    return _table(head, shown, f"By share pruned. {MEASURES}") if rows else ""


def _widths(page: Page, plan: Plan, curve: Curve) -> str:
    shares = [point.pruned for point in curve.budgets if point.pruned]
    maps, kept = [], {}
    for share in shares:
        kept[share] = kept_shares(plan, share)
        whole = sum(int((of == 0).sum()) for of in kept[share].values())
        bare = f"{whole} expert{'s' * (whole != 1)} without any channel"
        maps.append(
            page.figure(
                f"widths-{100 * share:g}",
                widths_figure(plan, share),
                f"Share of channels that each expert keeps at {percent(share)} pruned; {bare}",
                f"{percent(share)} pruned, {bare}",
            )
        )
    rows = [
        (str(i), *(f"{float(kept[share][i].mean()):.1%}" for share in shares))
        for i in sorted(plan.layers)
    ]
    head = ("layer", *map(percent, shares))
    return (
        "<p>A row a layer, a column an expert; bright is wide.</p>"
        f'<div class="maps">{"".join(maps)}</div>'
        + _table(head, rows, "Share of channels kept in each layer, by share pruned")
    )


def _parts(page: Page, plan: Plan, weights: str | Path | None, curve: Curve) -> str:
    budgets = [point.pruned for point in curve.budgets]
    found = parts(plan, weights, budgets)
    alt = f"Bytes at {percent(budgets[-1])} pruned: " + "; ".join(
        f"{name} {size(sizes[-1])}" for name, sizes in found.items()
    )
    drawn = page.figure(
        "parts", parts_figure(found, budgets), alt, "Bytes of each part; hatched: pruned away"
    )
    rows = [(name, *map(size, sizes)) for name, sizes in found.items()]
    rows.append(("left in all", *(size(plan.member(share).bytes) for share in budgets)))
    routed = [count(plan.member(share).routed_parameters) for share in budgets]
    active = [count(plan.member(share).active_parameters) for share in budgets]
    rows += [("routed parameters", *routed), ("of these active for a token", *active)]
    head = ("part", *map(percent, budgets))
    return drawn + _table(head, rows, "Bytes of each part and parameters, by share pruned")


def _coverage(page: Page, plan: Plan, evidence: Evidence | None) -> str:
    recipe = plan.recipe
    if not recipe.data:
        return "<p>No text was read: the channels were ranked by their weights alone.</p>"
    said = (
        f"<p>Ranked on {recipe.samples:,} windows of {recipe.seq_len:,} tokens of "
        f"{_text(recipe.data)}.</p>"
    )
    thin = recipe.thin_experts
    number = sum(map(len, thin.values()))
    if number:
        said += (
            f'<p class="warn">Experts that saw fewer than {THIN} tokens: {number}. The order of '
            "their channels is a guess.</p>"
        )
    else:
        said += f"<p>Every expert saw at least {THIN} tokens.</p>"
    if evidence is None:
        rows = [(str(i), ", ".join(map(str, experts))) for i, experts in sorted(thin.items())]
        return said + (_table(("layer", "experts that saw too little"), rows) if rows else "")
    head = ("layer", "least", "median", "most", f"experts below {THIN}")
    for number, (source, counts) in enumerate(evidence.counts().items(), 1):
        caption, found = f"Tokens of {source} that each expert saw", coverage(evidence, source)
        alt = f"{caption}; the least is {min(row.least for row in found)}"
        said += page.figure(f"coverage-{number}", map_figure(counts, "tokens"), alt, caption)
        figures = [
            (str(r.layer), f"{r.least:,}", f"{r.median:,.0f}", f"{r.most:,}", str(len(r.thin)))
            for r in found
        ]
        said += _table(head, figures, caption)
    return said


def _samples(samples: Sequence[Sample]) -> str:
    shown = ["<p>Beginnings of held-out text, continued greedily: always the likeliest token.</p>"]
    for number, sample in enumerate(samples, 1):
        rows = [("beginning", sample.prompt), ("the text itself", sample.original)]
        rows += [(f"{percent(share)} pruned", text) for share, text in sample.continued.items()]
        shown.append(f"<h3>{number}. {_text(sample.file)}</h3>{_pairs(rows)}")
    return "".join(shown)


def _made(recipe: Recipe, curve: Curve) -> str:
    record = Record(kind="family", recipe=recipe, **curve.of.model_dump())
    lines = commands(record) or ["(the options of the commands were not recorded)"]
    versions = ", ".join(f"{name} {version}" for name, version in recipe.versions.items())
    rows = [
        ("base model", recipe.base_model),
        ("revision", recipe.revision or "unknown"),
        ("calibration tokens, sha256", recipe.data_sha256 or "none"),
        ("plan, sha256", record.plan_sha256),
        ("weights, sha256", record.weights_sha256),
        ("hardware", recipe.hardware or "unknown"),
        ("versions", versions or "unknown"),
    ]
    return f"<pre>{_text(chr(10).join(lines))}</pre>{_pairs(rows)}"


# --- pieces --------------------------------------------------------------------------------------


def _text(text: str) -> str:
    return html.escape(text)


def _pairs(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{_text(name)}</th><td>{_text(text)}</td></tr>' for name, text in rows
    )
    return f'<table class="sample">{body}</table>'


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], caption: str = "") -> str:
    """A table that scrolls by itself where the window is narrow; first cells name their rows."""
    top = "".join(f'<th scope="col">{_text(cell)}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{_text(first)}</th>'
        + "".join(f"<td>{_text(cell)}</td>" for cell in rest)
        + "</tr>\n"
        for first, *rest in rows
    )
    said = f"<caption>{_text(caption)}</caption>" if caption else ""
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{_text(caption or "table")}">'
        f"<table>{said}<thead><tr>{top}</tr></thead><tbody>\n{body}</tbody></table></div>\n"
    )
