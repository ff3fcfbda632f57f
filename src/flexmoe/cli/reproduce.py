"""The command ``flexmoe reproduce``."""

from __future__ import annotations

import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from flexmoe.cli.common import quiet, say

EXAMPLES = """\
[bold]Examples[/bold]

  # a family, plan or export

  flexmoe reproduce families/tiny

  # from its card alone

  flexmoe reproduce README.md --model ./OLMoE-1B-7B-0924 -o again
"""


def reproduce(
    path: Annotated[Path, typer.Argument(help="card (README.md), family, plan or export")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="keep what is made here; default: not kept")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="where the base model lies here; default: as recorded")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="where the text lies here; default: as recorded")
    ] = None,
    device: Annotated[str | None, typer.Option(help="device; default: as recorded")] = None,
) -> None:
    """Make it again from what is recorded, and compare: exit code 0 if equal, 1 if not.

    Kept with -o, a run that was killed goes on after its last finished step.
    """
    from rich.table import Table

    from flexmoe.progress import bar
    from flexmoe.reports.provenance import commands
    from flexmoe.reports.reproduce import compare, read_record, rerun

    quiet()
    record, original = read_record(path, track=bar)
    for command in commands(record):
        typer.echo(command)  # not wrapped: commands are to be copied
    keep = nullcontext(out) if out else tempfile.TemporaryDirectory(prefix="flexmoe-")
    with keep as place:
        made = rerun(record, place, model=model, data=data, device=device, track=bar)
        found = compare(record, made, original, track=bar)
    table = Table(title=f"{path}, made again", title_justify="left")
    for name in ("", "recorded", "now", ""):
        table.add_column(name, overflow="fold")
    for line in found.lines:
        verdict = {True: "equal", False: "DIFFERENT", None: ""}[line.equal]
        short = 60 if line.equal is None else 16  # a sum is known by its first digits
        table.add_row(line.what, line.recorded[:short], line.now[:short], verdict)
    say(table)
    for detail in found.details:
        say(detail)
    if out is not None:
        say(f"kept: {made}")
    if not found.different:
        say("equal")
        return
    say(
        f"different: {', '.join(found.different)}. Other inputs give other results; with the same "
        "inputs other versions, devices or numbers of threads change sums in their last digits, "
        "and what depends on them.",
        style="yellow",
    )
    raise typer.Exit(1)
