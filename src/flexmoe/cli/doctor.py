"""The command ``flexmoe doctor``."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexmoe.cli.common import Device, quiet, say

if TYPE_CHECKING:
    from flexmoe.doctor.found import Diagnosis

EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe doctor ./Qwen3-30B-A3B

  flexmoe doctor families/tiny --json

  # in a second, without torch

  flexmoe doctor ./Qwen3-30B-A3B --quick --json
"""


def doctor(
    model: Annotated[str, typer.Argument(help="folder, model in the hub's cache, or 'tiny'")],
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="only what the files say, at once")
    ] = False,
) -> None:
    """What a checkpoint is, what works with it, what that takes, and why it would fail.

    Reads configs and headers, no weights. Memory and time are estimates for default settings.
    Exit code 2 if compress would fail. With --quick transformers is not loaded and the model not
    tried: needs are what jobs take at least.
    """
    from flexmoe.doctor.found import report
    from flexmoe.doctor.glance import glance

    if as_json:
        found = _quick(model, device) if quick else _examine(model, device, lambda found: None)
        typer.echo(json.dumps(report(found), indent=1))
        raise typer.Exit(2 if found.problems else 0)
    first = _quick(model, device) if quick else glance(model, device)
    if first.layers:
        _describe(first)
    if first.needs:
        say(_needs(first, at_least=True))
    _say_problems(first.problems)
    if quick:
        _say_warnings(first.warnings)
    if not first.model_type or quick:  # there is nothing else to look at
        raise typer.Exit(2 if first.problems else 0)
    say("loading transformers, to try the model and count activations ...")
    told = [first]

    def describe(found: Diagnosis) -> None:
        if not told[-1].layers:
            _describe(found)
        elif not found.same_as(told[-1]):
            say("warning: transformers itself reads it otherwise:", style="yellow")
            _describe(found)
        told.append(found)

    found = _examine(model, device, describe)
    if found.layers and not told[-1].layers:
        _describe(found)
    if found.needs:
        say(_needs(found))
    _say_warnings(found.warnings)
    said = first.problems if first.layers else []  # others stand far above by now
    _say_problems([line for line in found.problems if line not in said])
    if found.problems:
        raise typer.Exit(2)
    say(f"next: flexmoe compress {model} -o FAMILY")


def _quick(model: str, device: str) -> Diagnosis:
    """What the files alone say, and what they say does not fit."""
    from flexmoe.doctor.glance import glance
    from flexmoe.doctor.room import note_what_does_not_fit
    from flexmoe.errors import FlexmoeError

    found = glance(model, device)
    if not found.problems and not found.needs:
        raise FlexmoeError(
            f"the files of {model} alone say too little (architecture '{found.model_type}', or a "
            "device that is neither cpu nor cuda): leave out --quick"
        )
    note_what_does_not_fit(found)
    return found


def _examine(model: str, device: str, described: Callable[[Diagnosis], None]) -> Diagnosis:
    from flexmoe.config import CompressConfig
    from flexmoe.doctor.diagnosis import examine

    quiet()
    return examine(model, CompressConfig(device=device), described=described)


def _say_warnings(warnings: list[str]) -> None:
    for line in warnings:
        say(f"warning: {line}", style="yellow")


def _say_problems(problems: list[str]) -> None:
    for line in problems:
        say(f"problem: {line}", style="red")


def _describe(found: Diagnosis) -> None:
    from flexmoe.reports.report import count

    say(f"{found.model}: {found.architecture} ({found.model_type}), {found.dtype}")
    say("supported   yes: its experts are on the interface of transformers")
    shares = ", ".join(f"{count(number)} {name}" for name, number in found.parameters.items())
    say(f"parameters  {shares}")
    say(f"experts     {found.experts_per_token or '?'} a token")
    for what, group in groupby(found.layers, key=_kind):
        same = list(group)
        where = _numbers([layer.index for layer in same])
        say(f"MoE layers  {where}: {what}")
    if found.widths:
        say(_widths(found))
    for layout, why in found.exports.items():
        say(f"export      {layout}: {why or 'works'}")


def _kind(layer: Any) -> str:
    shared = f", shared experts of {layer.shared_parameters:,} parameters" * bool(
        layer.shared_parameters
    )
    own = " activation" * (layer.activation == "its own")
    return (
        f"{layer.experts} experts of {layer.channels} channels, hidden {layer.hidden}, "
        f"{layer.activation}{own}{shared}; {', '.join(layer.flags) or 'no flags'}"
    )


def _numbers(found: list[int]) -> str:
    if len(found) > 1 and found == list(range(found[0], found[-1] + 1)):
        return f"{found[0]} to {found[-1]}"
    return ", ".join(map(str, found))


def _widths(found: Diagnosis) -> Any:
    from rich.table import Table

    table = Table(title="one width for all experts", title_justify="left")
    for name in ("pruned", "width", "tensor parallel", "FP8 blocks of 128", "K-quants of 256"):
        table.add_column(name, justify="right")
    for row in found.widths:
        table.add_row(
            f"{row.pruned:.0%}",
            str(row.width),
            ", ".join(map(str, row.tensor_parallel)) or "no",
            "yes" if row.fp8_blocks else "no",
            "yes" if row.k_quants else "no",
        )
    return table


def _needs(found: Diagnosis, at_least: bool = False) -> Any:
    from rich.table import Table

    from flexmoe.reports.report import size

    what = "needed at least, without activations," if at_least else "estimates"
    memory = f"{size(found.memory_free)} of memory and " if found.memory_free else ""
    title = f"{what} on {found.device}: {memory}{size(found.disk_free)} of disk are free"
    table, unknown = Table(title=title, title_justify="left"), "" if at_least else "unknown"
    for name in ("job", "memory", "of which", "time", "disk", "state beside"):
        if name != "of which" or not at_least:
            table.add_column(name, justify="left" if name in ("job", "of which") else "right")
    for need in found.needs:
        parts = ", ".join(f"{name} {size(number)}" for name, number in need.parts.items())
        table.add_row(
            need.job,
            _within(need.memory, found.memory_free or None),
            *([] if at_least else [parts]),
            unknown if need.seconds is None else duration(need.seconds),
            _within(need.disk, found.disk_free - need.scratch),
            size(need.scratch) if need.scratch else "",
        )
    return table


def _within(needed: int, free: int | None) -> Any:
    """A size, in red where it is more than what is free (None: not known)."""
    from rich.text import Text

    from flexmoe.reports.report import size

    return Text(size(needed), style="" if free is None or needed <= free else "red")


def duration(seconds: float) -> str:
    """A time for people: 3 h 20 min."""
    if seconds < 60:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
