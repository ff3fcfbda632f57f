"""The command that measures: ``flexmoe eval``."""

from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from flexmoe.cli.common import Base, BatchSize, Router, SeqLen, quiet, say
from flexmoe.files import check_file

EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe eval families/tiny --json tiny.json

  flexmoe eval families/tiny --pruned 0,0.4 --data books.valid,my.jsonl

  # for: flexmoe pick

  flexmoe eval families/tiny --pairs blimp.jsonl.gz --save

  # exit code 1 if it keeps less

  flexmoe eval tiny-40 --against tiny --min-recovery 0.95

  flexmoe eval families/reap --router remove --json removed.json

  # fewer experts for some tokens

  flexmoe eval tiny --policy top-any:0.9

  flexmoe eval families/qwen3 --tasks arc_easy,./my_task.yaml --generate prompts.jsonl
"""


def evaluate(
    path: Annotated[str, typer.Argument(help="family, plan, export, or any MoE checkpoint")],
    pruned: Annotated[
        str, typer.Option(help="budgets of a family: 0,0.4 or all; compared with 0 if it is there")
    ] = "all",
    against: Annotated[
        str | None,
        typer.Option(help="model to compare with, measured too; default: 0 among --pruned"),
    ] = None,
    data: Annotated[
        str,
        typer.Option(help="held-out text: FILE,... ('tiny': four domains, books.valid: one)"),
    ] = "tiny",
    samples: Annotated[int | None, typer.Option(help="windows a file; default: all")] = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = None,
    pairs: Annotated[
        Path | None,
        typer.Option(help="minimal pairs: FILE.jsonl[.gz] of sentence_good, sentence_bad"),
    ] = None,
    pairs_per_paradigm: Annotated[
        int | None, typer.Option(help="the first of each paradigm; default: all")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(help="of lm-evaluation-harness: arc_easy,./my_task.yaml")
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(help="the first documents of each task; default: all")
    ] = None,
    generate: Annotated[
        str | None,
        typer.Option(
            help="do answers loop, or never end? FILE.jsonl[.gz] of prompt or messages, or 'data': "
            "the beginnings of held-out windows"
        ),
    ] = None,
    generate_limit: Annotated[
        int | None, typer.Option(help="the first prompts; default: all of a file, 64 of 'data'")
    ] = None,
    json_prompts: Annotated[
        Path | None,
        typer.Option(help="are answers JSON, or tool calls that fit? FILE as for --generate"),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="of an answer, after which it never ends; default: 256")
    ] = None,
    min_recovery: Annotated[
        float | None,
        typer.Option(help="exit code 1 if a measured budget keeps less than this share: 0.95"),
    ] = None,
    by: Annotated[
        str, typer.Option(help="share of what, for --min-recovery: loss, pairs or tasks")
    ] = "loss",
    save: Annotated[
        bool, typer.Option("--save", help="keep the curve in the family, for: flexmoe pick")
    ] = False,
    json_out: Annotated[Path | None, typer.Option("--json", help="write all results here")] = None,
    router: Router = None,
    policy: Annotated[
        str | None,
        typer.Option(help="at run time: NAME[:NUMBER], see: policies; compared with none"),
    ] = None,
    policy_data: Annotated[
        str | None, typer.Option(help="text that a policy is fitted on; default: tiny")
    ] = None,
    base: Base = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, auto, or spread: all GPUs, memory and disk")
    ] = "auto",
) -> None:
    """How good every budget is, on held-out text, minimal pairs, tasks and prompts of yours.

    All is compared with budget 0 if it is among --pruned (--save and --min-recovery add it), or
    the model --against, in the same run. increase: of the loss;
    kept: exp(-increase), the share of the likelihood per token; KL: divergence of the predictions,
    nats per token; top-1: how often the most likely token is the same; ± is half of a 95%
    interval, paired where two are compared.
    """
    from flexmoe.config import budget_list
    from flexmoe.errors import FlexmoeError
    from flexmoe.evaluation.evaluate import measure
    from flexmoe.evaluation.inputs import EvaluateConfig
    from flexmoe.evaluation.tables import tables
    from flexmoe.progress import bar

    quiet()
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
        against=against,
        tasks=[] if tasks is None else [name for name in tasks.split(",") if name],
        task_limit=task_limit,
        generate=generate,
        generate_limit=generate_limit,
        json_prompts=json_prompts,
        max_new_tokens=max_new_tokens,
        min_recovery=min_recovery,
        by=by,
        router=router,
        policy=policy,
        policy_data=policy_data,
    )
    if json_out is not None:
        check_file(json_out)
    done = measure(path, config, command=_command(), track=bar)
    for table in tables(done, path):
        say(table)
    if pruned != "all" and not any("increase" in row for row in done.members):
        say("compared with nothing: that takes 0 among --pruned of a family, or --against MODEL")
    if json_out is not None:
        found = {"model": path, **done.about, "against": done.against}
        found |= {"rows": done.rows, "budgets": done.members}
        json_out.write_text(json.dumps(found, indent=1) + "\n")
    if done.saved is not None:
        say(f"saved in {done.saved}; next: flexmoe pick {path} --keep 0.95")
    if done.verdict is not None:
        typer.echo(done.verdict.text, err=not done.verdict.passed)
    if done.unsaved is not None:
        raise FlexmoeError(done.unsaved)
    if done.verdict is not None and not done.verdict.passed:
        raise typer.Exit(1)


def _command() -> str:
    """The command line as it was given, of paths the last part: results are passed on."""
    words = [Path(word).name if os.path.exists(word) else word for word in sys.argv]
    return shlex.join(words)
