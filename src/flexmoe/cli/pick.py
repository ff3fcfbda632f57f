"""The command that chooses: ``flexmoe pick``."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from flexmoe.cli.common import quiet

EXAMPLES = """\
[bold]Examples[/bold]

  # the poorest that keeps 95 %

  flexmoe pick families/qwen3 --keep 0.95

  # the richest that fits

  flexmoe pick families/qwen3 --memory 24GiB

  flexmoe pick families/qwen3 --params 20B --keep 0.9 --by pairs --json
"""


def pick(
    family: Annotated[str, typer.Argument(help="family folder, or a plan alone")],
    keep: Annotated[
        float | None, typer.Option(help="share of the full model's quality to keep: 0.95")
    ] = None,
    by: Annotated[
        str, typer.Option(help="quality: loss (likelihood per token), pairs or tasks")
    ] = "loss",
    memory: Annotated[
        str | None, typer.Option(help="room for the weights: 24GiB, 24GB, 500MB")
    ] = None,
    params: Annotated[
        str | None, typer.Option(help="most parameters, all counted: 20B, 300M")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """The member of a family that keeps a quality (the poorest) or fits a size (the richest).

    Of several wishes all must hold; the richest that fits is taken then.
    """
    from flexmoe.evaluation.pick import Wanted
    from flexmoe.evaluation.pick import pick as choose
    from flexmoe.progress import bar
    from flexmoe.reports.report import parse_bytes, parse_count

    quiet()
    wanted = Wanted(
        keep=keep,
        by=by,
        memory=None if memory is None else parse_bytes(memory),
        params=None if params is None else parse_count(params),
    )
    found = choose(family, wanted, track=bar)
    if as_json:
        chosen = found.candidate
        fields = {
            **chosen.member.model_dump(),
            "parameters": chosen.parameters,
            "quality": chosen.quality and chosen.quality.model_dump(),
            "export": found.export,
            "notes": found.notes,
        }
        typer.echo(json.dumps(fields, indent=1))
    else:
        typer.echo("\n".join(_lines(family, found)))  # not wrapped: commands are to be copied


def _lines(family: str, found: Any) -> list[str]:
    from flexmoe.reports.report import count, size

    member, quality = found.candidate.member, found.candidate.quality
    of_export = "" if found.layout is None else f" as a {found.layout} export"
    lines = [
        f"{family} at {100 * member.pruned:g} % pruned ({member.achieved:.2%} exactly)",
        f"parameters  {count(found.candidate.parameters)}, of these "
        f"{count(member.routed_parameters)} of routed experts",
        f"size        {size(member.bytes)} ({member.bytes:,} bytes){of_export}: weights only, "
        "activations and cache come on top",
    ]
    if quality is not None:
        base = found.curve.base
        lines.append(
            f"quality     keeps {quality.kept:.1%}{_range(quality.kept_interval)} of the "
            f"likelihood per token of {base}: loss {quality.nll:.3f}, "
            f"{quality.increase:+.3f} on {found.curve.data}"
        )
        if (of := quality.pairs) is not None:
            line = f"            {of.accuracy:.1%}{_range(of.interval)} of pairs right"
            if of.ratio is not None:
                line += f", {of.ratio:.1%}{_range(of.ratio_interval)} of those of {base}"
            lines.append(line)
        tasks = [(of.ratio, of.ratio_interval, name) for name, of in (quality.tasks or {}).items()]
        for ratio, spread, name in sorted(t for t in tasks if t[0] is not None)[:1]:
            lines.append(
                f"            {ratio:.1%}{_range(spread)} of the score of {base} on {name}, the "
                f"lowest of {len(tasks)} tasks"
            )
    elif not found.notes:
        lines.append("quality     not measured")
    lines.append(f"export      {found.export or 'not needed: this is the full model'}")
    return lines + [f"note        {note}" for note in found.notes]


def _range(spread: tuple[float, float] | None) -> str:
    return "" if spread is None else f" ({spread[0]:.1%} to {spread[1]:.1%})"
