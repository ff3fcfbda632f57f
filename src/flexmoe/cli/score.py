"""The commands ``flexmoe score`` and ``flexmoe methods``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexmoe.cli.common import BatchSize, Device, Model, Reference, Samples, SeqLen, quiet, say

EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe score tiny --method reap -o reap.safetensors

  flexmoe score tiny --method reap --method ean --method ./mine.py:score -o scores.safetensors

  flexmoe score ./tuned --method router-change --reference ./before -o change.safetensors
"""


def score(
    model: Model,
    method: Annotated[
        list[str],
        typer.Option(help="NAME or FILE.py:FUNCTION, see: methods; several share one pass"),
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="file to write (.safetensors)")],
    data: Annotated[
        str | None,
        typer.Option(help="calibration text: FILE, folder or hub id[:WEIGHT],...; default: tiny"),
    ] = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = None,
    reference: Reference = None,
    seed: Annotated[int, typer.Option(help="draws windows and random scores")] = 0,
    device: Device = "auto",
) -> None:
    """Write raw scores of methods: tensors layers.{i}.{method} [E, I] or [E], higher = keep."""
    from flexmoe.progress import bar
    from flexmoe.score import score as run

    quiet()
    found = run(
        model,
        method,
        out,
        data=data,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        device=device,
        reference=reference,
        track=bar,
    )
    for name, scores in found.items():
        shapes = sorted({tuple(s.shape) for s in scores.values()})
        say(f"{out}: {name}, {len(scores)} layers of {', '.join(str(list(s)) for s in shapes)}")


def policies() -> None:
    """List the run-time policies: what is computed, and what their number means."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from flexmoe.policies import all_policies

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("policy", "what is computed", "its number", "paper"):
        table.add_column(name, overflow="fold")
    for found in sorted(all_policies().values(), key=lambda p: p.name):
        name = found.name + ("" if found.default is None else f"[:{found.default:g}]")
        means = found.argument + ("" if found.second is None else f"; /NUMBER: {found.second}")
        table.add_row(name, found.summary, means, found.paper)
    say(table)


def methods() -> None:
    """List the scoring methods: unit, passes over the text and their cost, default allocation."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from flexmoe.methods import UNITS, all_methods

    caption = (
        "passes over the text and what one costs; rule: what --allocate is unless given; router: "
        "what the paper does with it, see --router"
    )
    for unit in UNITS:
        table = Table(
            box=SIMPLE_HEAD,
            pad_edge=False,
            title=f"methods that score {unit}s",
            title_justify="left",
            caption=caption if unit == UNITS[-1] else None,
            caption_justify="left",
        )
        for name in ("method", "passes", "rule", "router"):
            table.add_column(name, no_wrap=True)
        table.add_column("paper", overflow="fold")
        for found in sorted(all_methods().values(), key=lambda method: method.name):
            if found.unit == unit:
                passes = f"{found.passes} {found.cost}" if found.passes else found.cost
                table.add_row(found.name, passes, found.allocate, found.router, found.paper)
        say(table)
