"""The whole job on the model that comes with flexmoe, in about three minutes on two cores."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from flexmoe.config import CompressConfig
from flexmoe.data import evaluation_windows
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.evaluate import Row, budget_rows, evaluate, mean_nll, perplexity
from flexmoe.exporter import ExportReport, export, write_family
from flexmoe.family import load, set_budget
from flexmoe.learn import LearnConfig
from flexmoe.pipeline import Ranked, attach_plan, make_plan, rank_channels
from flexmoe.plan import Plan
from flexmoe.progress import Track
from flexmoe.reports.plots import plot_quality, save, widths_figure
from flexmoe.reports.report import count, percent, size

MARK = ".flexmoe-demo"  # a folder with this file may be replaced
CHOOSING = 8  # held-out windows of each domain that choose the allocator
SHARES = (0.2, 0.4, 0.6, 0.8)
COMPARED = ("uniform", "layer", "global", "learned")
PROMPT = "The captain looked at the sea and"
CONFIG = CompressConfig(
    data="tiny", samples=192, seq_len=256, allocate="learned", learn=LearnConfig(steps=80)
)


def demo(
    out: Path,
    console: Console,
    track: Track,
    config: CompressConfig = CONFIG,
    samples: int = 24,
) -> None:
    """Compress, export, evaluate on ``samples`` windows of each domain, plot and generate; all that
    is made lies in ``out``."""
    _fresh(out)
    start = time.monotonic()
    console.rule("1. Observe and rank the channels of every expert")
    ranked = rank_channels("tiny", config, track)
    assert ranked.windows is not None
    console.print(f"{ranked.windows.ids.numel():,} tokens seen by {len(ranked.layers)} MoE layers")

    console.rule("2. Widths for all budgets: learn, and compare the ways to allocate")
    plans = {name: make_plan(ranked, name, track) for name in COMPARED}
    held_out = evaluation_windows("tiny", ranked.tokenizer, samples=samples + CHOOSING, seq_len=256)
    windows = {name: ids[:samples] for name, ids in held_out.items()}
    choosing = {name: ids[samples:] for name, ids in held_out.items()}
    chosen = _compare(ranked, plans, choosing, console, track)

    console.rule("3. Write the family and export members")
    family = write_family(ranked.source, plans[chosen], out / "family", track, ranked.evidence)
    made = []
    for layout in ("uniform", "ragged"):
        done = export(family, out / f"{layout}-40", pruned=0.4, layout=layout, track=track)
        made.append(done)
        console.print(
            f"{done.path}: {done.pruned:.2%} pruned, {size(done.bytes)}; {done.checked} experts "
            "read back, equal to the masked model's"
        )

    console.rule("4. Every budget on held-out text")
    model = load(family, dtype=torch.float32)
    rows = budget_rows(model, windows, model.flexmoe_plan.budgets, track)
    curves = {f"{chosen} (the family)": rows}
    for name in COMPARED:
        if name != chosen:
            attach_plan(ranked, plans[name])
            curves[name] = budget_rows(ranked.model, windows, (0.0, *SHARES), track)
    plot_quality(curves, out / "quality.png", "tiny: loss on held-out text")
    title = f"share of channels kept at 40 % pruned ({chosen})"
    save(widths_figure(plans[chosen], 0.4), out / "widths-40.png", title)

    console.rule("5. A sample at three budgets, one model in memory")
    for pruned in (0.0, 0.4, 0.6):
        set_budget(model, pruned)
        console.print(f"[bold]{pruned:.0%} pruned:[/bold] {_sample(model, ranked)}\n")

    members = [{"name": "family", **row} for row in rows]
    members += [_export_row(done, windows, track) for done in made]
    console.print(_table(members, "one family and two exports on four held-out domains"))
    console.print(f"plots: {out}/quality.png, {out}/widths-40.png")
    console.print(f"done in {time.monotonic() - start:.0f} s; next: flexmoe --help")


def _export_row(done: ExportReport, windows: dict[str, Tensor], track: Track) -> Row:
    """The export, loaded again from its folder, as a row of the table."""
    nll = mean_nll(evaluate(load(done.path, dtype=torch.float32), windows, track=track))
    return {
        "name": f"{done.layout} export",
        "pruned": done.pruned,
        "routed_parameters": done.routed_parameters,
        "bytes": done.bytes,
        "nll": nll,
        "perplexity": perplexity(nll),
    }


def _table(rows: list[Row], title: str) -> Table:
    """Name, pruned share, routed parameters, bytes, loss, perplexity and its change to the first
    row."""
    table = Table("", title=title, title_justify="left")
    for name in ("pruned", "routed parameters", "size", "loss", "perplexity", "change"):
        table.add_column(name, justify="right")
    for row in rows:
        change = row["perplexity"] / rows[0]["perplexity"] - 1
        table.add_row(
            row["name"],
            percent(row["pruned"]),
            count(row["routed_parameters"]),
            size(row["bytes"]),
            f"{row['nll']:.3f}",
            f"{row['perplexity']:.2f}",
            "" if row is rows[0] else f"{change:+.1%}",
        )
    return table


def _fresh(out: Path) -> None:
    if out.exists():
        if not (out / MARK).is_file():
            raise FlexmoeError(f"'{out}' exists and is not from an earlier demo: use -o elsewhere")
        shutil.rmtree(out)
    out.mkdir(parents=True)
    (out / MARK).touch()


def _compare(
    ranked: Ranked,
    plans: dict[str, Plan],
    choosing: dict[str, Tensor],
    console: Console,
    track: Track,
) -> str:
    """Loss of each allocator's plan at four budgets on held-out windows that the final table does
    not use; the name of the best on average."""
    loss: dict[str, list[float]] = {}
    for name, plan in plans.items():
        attach_plan(ranked, plan)
        rows = budget_rows(ranked.model, choosing, SHARES, track)
        loss[name] = [row["nll"] for row in rows]
    table = Table(title="loss on held-out text to choose by", title_justify="left")
    table.add_column("allocate")
    for share in SHARES:
        table.add_column(f"{share:.0%} pruned", justify="right")
    for name, results in loss.items():
        table.add_row(name, *(f"{nll:.3f}" for nll in results))
    console.print(table)
    best = min(loss, key=lambda name: sum(loss[name]))
    console.print(f"best on average: [bold]{best}[/bold], which the family takes")
    return best


def _sample(model: PreTrainedModel, ranked: Ranked) -> str:
    inputs = ranked.tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.3)
    return " ".join(ranked.tokenizer.decode(out[0], skip_special_tokens=True).split())
