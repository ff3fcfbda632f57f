"""The command line: ``flexmoe doctor | compress | recover | export | eval | pick | report`` ...

Heavy imports happen inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from flexmoe import __version__
from flexmoe.cli import bench as cli_bench
from flexmoe.cli import compare as cli_compare
from flexmoe.cli import dequantize as cli_dequantize
from flexmoe.cli import doctor as cli_doctor
from flexmoe.cli import eval as cli_eval
from flexmoe.cli import pick as cli_pick
from flexmoe.cli import premoe as cli_premoe
from flexmoe.cli import recover as cli_recover
from flexmoe.cli import report as cli_report
from flexmoe.cli import reproduce as cli_reproduce
from flexmoe.cli import reweigh as cli_reweigh
from flexmoe.cli import score as cli_score
from flexmoe.cli import serve as cli_serve
from flexmoe.cli.common import (
    Base,
    BatchSize,
    Checkpointing,
    Device,
    MicroBatch,
    Model,
    Reference,
    Router,
    Samples,
    SeqLen,
    Shard,
    quiet,
    say,
)
from flexmoe.errors import FlexmoeError

app = typer.Typer(
    name="flexmoe",
    help="Rank once, cut anywhere, switch live: one Mixture-of-Experts model, every size.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

COMPRESS_EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe compress tiny -o families/tiny

  flexmoe compress allenai/OLMoE-1B-7B-0924 -o families/olmoe --data code.jsonl.gz:3,web.txt:1

  flexmoe compress ./Qwen3-30B-A3B -o families/qwen3 --method taylor --allocate global

  flexmoe compress ./model -o family --method ./mine.py:score

  flexmoe compress ./larger-than-memory -o family --memory 8GiB

  torchrun --nproc-per-node 8 -m flexmoe compress ./Qwen3-30B-A3B -o families/qwen3 --shard
"""
EXPORT_EXAMPLES = """\
[bold]Examples[/bold]

  # loads everywhere

  flexmoe export families/tiny --pruned 0.4 --layout uniform -o tiny-40

  # fewer experts

  flexmoe export families/reap --pruned 0.5 --layout uniform --router remove -o reap-50

  # smaller loss, needs flexmoe

  flexmoe export families/tiny --pruned 0.35 --layout ragged -o tiny-35
"""


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"flexmoe {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Set up what all commands share."""
    if os.environ.get("FLEXMOE_KERNEL"):  # else nothing heavy is imported for it
        from flexmoe.kernels import check_forced

        check_forced()


@app.command(epilog=COMPRESS_EXAMPLES)
def compress(
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="family folder to make")],
    data: Annotated[
        str | None,
        typer.Option(help="calibration text: FILE, folder or hub id[:WEIGHT],...; default: tiny"),
    ] = None,
    samples: Samples = None,
    seq_len: SeqLen = None,
    pruned: Annotated[
        str, typer.Option(help="budgets: shares of routed-expert parameters to remove")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8",
    method: Annotated[str, typer.Option(help="NAME or FILE.py:FUNCTION; see: methods")] = "fisher",
    allocate: Annotated[
        str | None,
        typer.Option(
            help="learned, global, layer, uniform, actions, rco, logistic, trapezoid, coverage; "
            "default: the method's own, see: methods (fisher: learned; with --memory global)"
        ),
    ] = None,
    reference: Reference = None,
    sequential: Annotated[
        float | None,
        typer.Option(
            help="score each layer with those before it pruned at this share (CAMERA-P, NAEE)"
        ),
    ] = None,
    router: Annotated[
        str,
        typer.Option(help="where whole experts go: keep, remove (rows sliced), constant (MoNE)"),
    ] = "keep",
    quantum: Annotated[
        int | None, typer.Option(help="widths are multiples of this; default: 32, less when tiny")
    ] = None,
    batch_size: BatchSize = None,
    learn_steps: Annotated[
        int | None, typer.Option(help="steps of --allocate learned (150), actions (300), rco (200)")
    ] = None,
    micro_batch: MicroBatch = None,
    checkpointing: Checkpointing = False,
    shard: Shard = False,
    memory: Annotated[
        str | None,
        typer.Option(help="hold no more than this, as 8GiB: the model is read layer by layer"),
    ] = None,
    seed: Annotated[int, typer.Option(help="draws windows, random scores and actions")] = 0,
    device: Device = "auto",
) -> None:
    """Turn a MoE checkpoint into a family: the ranked model and a plan for every budget."""
    from flexmoe.config import SETTINGS_OF, CompressConfig, budget_list
    from flexmoe.coverage import coverage, in_short
    from flexmoe.doctor.diagnosis import before_compress
    from flexmoe.evidence import FILE_NAME, Evidence
    from flexmoe.family import pick_device
    from flexmoe.memory import MostHeld, gib
    from flexmoe.methods import find_method
    from flexmoe.pipeline import compress as run
    from flexmoe.progress import bar, silent
    from flexmoe.reports.report import parse_bytes
    from flexmoe.resume import has_state
    from flexmoe.routing.rules import export_options
    from flexmoe.training import process_group, processes
    from flexmoe.uniform import takes_one_width

    quiet()
    limit = None if memory is None else parse_bytes(memory)
    learn = None
    if learn_steps is not None:
        rule = allocate or find_method(method).allocate
        learn = SETTINGS_OF.get(rule, SETTINGS_OF["learned"])(steps=learn_steps)
    with process_group(device) as place:
        config = CompressConfig(
            data=data,
            samples=samples,
            seq_len=seq_len,
            pruned=budget_list(pruned),
            method=method,
            allocate=allocate,
            reference=reference,
            sequential=sequential,
            router=router,
            quantum=quantum,
            batch_size=batch_size,
            micro_batch=micro_batch,
            checkpointing=checkpointing,
            learn=learn,
            seed=seed,
            device=place,
            shard=shard,
            memory=limit,
        )
        first = processes()[0] == 0
        # what goes on was looked at when it began
        for line in () if has_state(out) else before_compress(model, out, config):
            if first:
                say(f"warning: {line}", style="yellow")
        most = MostHeld(pick_device(place))
        with nullcontext() if limit is None else most:
            plan = run(model, out, config, track=bar if first else silent)
    if not first:
        return
    if (out / FILE_NAME).is_file():
        text, thin = in_short(coverage(Evidence.load(out, plan.recipe.data_sha256)))
        say(text, style="yellow" if thin else None)
    say(_plan_table(plan, f"{out}: {model} ranked by {method}, widths {plan.recipe.allocate}"))
    if limit is not None:
        say(f"at most {gib(most.bytes)} of memory were held, {gib(limit)} were allowed")
    share = 0.4 if 0.4 in plan.budgets else plan.budgets[-1]
    # stock where it can be
    stock = plan.recipe.unit == "channel" and takes_one_width(out, plan, share)
    options = "--layout uniform" if stock else export_options(plan, share)
    export = f"flexmoe export {out} --pruned {share:g} {options} -o DIR"
    say(f"next: flexmoe eval {out}, or {export}")


def _plan_table(plan: Any, title: str) -> Any:
    from rich.table import Table

    from flexmoe.reports.report import member_row

    table = Table(title=title, title_justify="left")
    for name in ("pruned", "exactly", "routed parameters", "active routed", "size (ragged)"):
        table.add_column(name, justify="right")
    for member in map(plan.member, plan.budgets):
        table.add_row(*member_row(member))
    return table


@app.command(epilog=EXPORT_EXAMPLES)
def export(
    family: Annotated[Path, typer.Argument(help="family folder, or a plan alone")],
    pruned: Annotated[float, typer.Option(help="share to remove: any the family reaches")],
    layout: Annotated[str, typer.Option(help="uniform, ragged or masked")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to make")],
    router: Router = None,
    base: Base = None,
) -> None:
    """Write one member of a family as a checkpoint of its own, at its real size."""
    from flexmoe.exporter import export as write
    from flexmoe.progress import bar
    from flexmoe.reports.report import count, size

    quiet()
    done = write(family, out, pruned=pruned, layout=layout, router=router, base=base, track=bar)
    say(
        f"{done.path}: {done.layout}, {done.pruned:.2%} pruned, {count(done.routed_parameters)} "
        f"routed parameters, {size(done.bytes)}\n{done.checked} experts read back and compared "
        f"with the source's: largest difference {done.max_difference:.1e} of the output"
    )


app.command(epilog=cli_doctor.EXAMPLES)(cli_doctor.doctor)
app.command(epilog=cli_dequantize.EXAMPLES)(cli_dequantize.dequantize)
app.command(epilog=cli_compare.EXAMPLES)(cli_compare.compare)
app.command(epilog=cli_recover.EXAMPLES)(cli_recover.recover)
app.command(epilog=cli_reweigh.EXAMPLES)(cli_reweigh.reweigh)
app.command("eval", epilog=cli_eval.EXAMPLES)(cli_eval.evaluate)
app.command("pick", epilog=cli_pick.EXAMPLES)(cli_pick.pick)
app.command(epilog=cli_report.EXAMPLES)(cli_report.report)
app.command(epilog=cli_reproduce.EXAMPLES)(cli_reproduce.reproduce)
app.command(epilog=cli_score.EXAMPLES)(cli_score.score)
app.command()(cli_score.methods)
app.command(epilog=cli_serve.EXAMPLES)(cli_serve.serve)
app.add_typer(cli_bench.app, name="bench")
app.command(epilog=cli_premoe.PROFILE_EXAMPLES)(cli_premoe.profile)
app.command()(cli_premoe.patterns)
app.command(epilog=cli_premoe.SPECIALISE_EXAMPLES)(cli_premoe.specialise)
app.command()(cli_score.policies)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("-o", "--out", help="folder for all results")] = Path("demo"),
) -> None:
    """The whole job on the small model that comes with flexmoe: 3 to 6 minutes on two cores."""
    from rich.console import Console

    from flexmoe.demo import demo as run
    from flexmoe.progress import bar

    quiet()
    run(out, Console(), bar)


def main() -> None:
    """Entry point: a user's mistake, or a full machine, ends in one message and exit code 2."""
    # end as on Ctrl-C, so that what is half-written goes
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except Exception as error:
        said = str(error) if isinstance(error, FlexmoeError) else _of_the_machine(error)
        if said is None:
            raise
        print(f"flexmoe: {said}", file=sys.stderr)
        sys.exit(2)


def _of_the_machine(error: Exception) -> str | None:
    """What to say of memory that is out and of files that cannot be read or written; None of any
    other error."""
    from safetensors import SafetensorError

    from flexmoe.memory import out_of_memory

    if out_of_memory(error):
        reason = (str(error) or "out of memory").splitlines()[0]
        return (
            f"{reason}\nUse a smaller --batch-size (down to 1) or --seq-len, or a device with more "
            "memory."
        )
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror + (f": '{error.filename}'" if error.filename else "")
    return str(error) if isinstance(error, SafetensorError) else None
