"""The commands that measure and choose: ``flexmoe eval | pick``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from flexmoe.cli_common import Base, BatchSize, Device, quiet, say
from flexmoe.files import check_file

EVAL_EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe eval families/tiny --json tiny.json

  flexmoe eval families/tiny --pruned 0,0.4 --data books.valid,my.jsonl

  flexmoe eval families/tiny --pairs blimp.jsonl.gz --save       for: flexmoe pick

  flexmoe eval tiny-40
"""
PICK_EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe pick families/qwen3 --keep 0.95                        the poorest that keeps 95 %

  flexmoe pick families/qwen3 --memory 24GiB                     the richest that fits

  flexmoe pick families/qwen3 --params 20B --keep 0.9 --by pairs --json
"""


def evaluate(
    path: Annotated[str, typer.Argument(help="family, plan, export, or any MoE checkpoint")],
    pruned: Annotated[str, typer.Option(help="budgets of a family: 0,0.4 or all")] = "all",
    data: Annotated[
        str,
        typer.Option(help="held-out text: FILE,... ('tiny': four domains, books.valid: one)"),
    ] = "tiny",
    samples: Annotated[int | None, typer.Option(help="windows a file; default: all")] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="tokens a window; default: a quarter of the context, <= 2048")
    ] = None,
    batch_size: BatchSize = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="minimal pairs: FILE.jsonl[.gz] of sentence_good, sentence_bad"),
    ] = None,
    pairs_per_paradigm: Annotated[
        int | None, typer.Option(help="the first of each paradigm; default: all")
    ] = None,
    save: Annotated[
        bool, typer.Option("--save", help="keep the curve in the family, for: flexmoe pick")
    ] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="write the rows here")] = None,
    base: Base = None,
    device: Device = "auto",
) -> None:
    """Loss and perplexity on held-out text, for every budget and data file; minimal pairs, too.

    increase: of the loss over budget 0; kept: exp(-increase), the share of the likelihood per
    token; ± is half of a 95% interval, paired where budgets are compared.
    """
    from flexmoe.evaluate import EvaluateConfig, measure
    from flexmoe.pipeline import budget_list
    from flexmoe.progress import bar

    quiet()
    if json_out is not None:
        check_file(json_out)
    config = EvaluateConfig(
        data=data,
        pruned=None if pruned == "all" else budget_list(pruned),
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        base=base,
        device=device,
        pairs=pairs,
        pairs_per_paradigm=pairs_per_paradigm,
        save=save,
    )
    done = measure(path, config, track=bar)
    files = ", ".join(dict.fromkeys(row["data"] for row in done.rows))
    say(_text_table(done.members, f"{path} on {files}"))
    if pairs is not None:
        say(_pairs_table(done.members, f"{path} on {pairs.name}"))
    if json_out is not None:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        found = {"model": path, "rows": done.rows, "budgets": done.members}
        json_out.write_text(json.dumps(found, indent=1) + "\n")
    if done.saved is not None:
        say(f"saved in {done.saved}; next: flexmoe pick {path} --keep 0.95")


def _text_table(members: list[dict[str, Any]], title: str) -> Any:
    """Of each budget its size and loss; where there is a base, the increase over it with half of
    its 95 % interval, and the share of the likelihood a token that is kept."""
    from flexmoe.evaluate import perplexity
    from flexmoe.report import count, size

    table = _table(title, "pruned", "routed", "size", "loss", "perplexity", "increase", "kept")
    for row in members:
        cells = [count(row["routed_parameters"]), size(row["bytes"])]
        cells += [f"{row['nll']:.3f}", f"{perplexity(row['nll']):.2f}"]
        if row["pruned"] and "increase" in row:
            increase = f"{row['increase']:+.3f}{_half(row['increase_interval'], 3)}"
            cells += [increase, f"{row['kept']:.1%}"]
        table.add_row(f"{100 * row['pruned']:.4g}%", *cells)
    return table


def _pairs_table(members: list[dict[str, Any]], title: str) -> Any:
    """Of each budget its accuracy; where there is a base, the ratio to it, of all and of what is
    above chance; each with half of its 95 % interval."""
    table = _table(
        f"{title}, {members[0]['pairs']['n']} pairs",
        *("pruned", "right", "of the base's", "of its margin above chance"),
    )
    for row in members:
        of, cells = row["pairs"], []
        for name, spread in (
            ("accuracy", "interval"),
            ("ratio", "ratio_interval"),
            ("margin_ratio", "margin_ratio_interval"),
        ):
            known = of[name] is not None and (row["pruned"] or name == "accuracy")
            cells.append(f"{of[name]:.3f}{_half(of[spread], 3)}" if known else "")
        table.add_row(f"{100 * row['pruned']:.4g}%", *cells)
    return table


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _half(spread: Any, digits: int) -> str:
    return "" if spread is None else f" ±{(spread[1] - spread[0]) / 2:.{digits}f}"


def pick(
    family: Annotated[str, typer.Argument(help="family folder, or a plan alone")],
    keep: Annotated[
        float | None, typer.Option(help="share of the full model's quality to keep: 0.95")
    ] = None,
    by: Annotated[
        str, typer.Option(help="quality: loss (likelihood per token) or pairs (their accuracy)")
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
    from flexmoe.pick import Wanted, parse_bytes, parse_count
    from flexmoe.pick import pick as choose
    from flexmoe.progress import bar

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
    from flexmoe.report import count, size

    member, quality = found.candidate.member, found.candidate.quality
    lines = [
        f"{family} at {100 * member.pruned:g} % pruned ({member.achieved:.2%} exactly)",
        f"parameters  {count(found.candidate.parameters)}, of these "
        f"{count(member.routed_parameters)} of routed experts",
        f"size        {size(member.bytes)} ({member.bytes:,} bytes) as a ragged export: weights "
        "only, activations and cache come on top",
    ]
    if quality is not None:
        lines.append(
            f"quality     keeps {quality.kept:.1%}{_range(quality.kept_interval)} of the "
            f"likelihood per token: loss {quality.nll:.3f}, "
            f"{quality.increase:+.3f} on {found.curve.data}"
        )
        if (of := quality.pairs) is not None:
            line = f"            {of.accuracy:.1%}{_range(of.interval)} of pairs right"
            if of.ratio is not None:
                line += f", {of.ratio:.1%}{_range(of.ratio_interval)} of the full model's"
            lines.append(line)
    elif not found.notes:
        lines.append("quality     not measured")
    lines.append(f"export      {found.export or 'not needed: this is the full model'}")
    return lines + [f"note        {note}" for note in found.notes]


def _range(spread: tuple[float, float] | None) -> str:
    return "" if spread is None else f" ({spread[0]:.1%} to {spread[1]:.1%})"
