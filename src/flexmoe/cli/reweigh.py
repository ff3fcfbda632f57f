"""The command ``flexmoe reweigh``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexmoe.cli.common import quiet, say

EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe reweigh families/tiny --data books.train:1,code.train:3 -o plans/code

  flexmoe eval plans/code --base tiny
"""


def reweigh(
    family: Annotated[Path, typer.Argument(help="family folder that compress made")],
    data: Annotated[str, typer.Option(help="weights of its sources: NAME[:WEIGHT],...")],
    out: Annotated[Path, typer.Option("-o", "--out", help="plan folder to make")],
    allocate: Annotated[
        str, typer.Option(help="global, layer, uniform or another that learns nothing")
    ] = "global",
) -> None:
    """A plan for another mixture of a family's texts, from what it keeps: no pass, no model."""
    from flexmoe.coverage import coverage, in_short
    from flexmoe.reweigh import reweigh as run

    quiet()
    plan, evidence = run(family, data, out, allocator=allocate)
    text, thin = in_short(coverage(evidence))
    say(text, style="yellow" if thin else None)
    say(f"{out}: a plan for {plan.recipe.base_model}, {data}, {plan.recipe.method} {allocate}")
    say(f"next: flexmoe eval {out}")
