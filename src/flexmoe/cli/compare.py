"""The command ``flexmoe compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexmoe.cli.common import BatchSize, Device, Model, Reference, Samples, SeqLen, quiet, say
from flexmoe.files import check_file

EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe compare tiny --methods all --pruned 0.25,0.5 --json tiny.jsonl

  flexmoe compare ./Qwen3-30B-A3B --methods reap,heapr,fisher@global --pruned 0.25,0.5
      --data code.jsonl --eval code-held-out.jsonl --json qwen3.jsonl --plot qwen3.png

  flexmoe compare tiny --methods reap,reap+keep,reap+constant,./mine.py:score --pruned 0.5
      --json rules.jsonl
"""


def compare(
    model: Model,
    methods: Annotated[
        str,
        typer.Option(help=r"METHOD\[@ALLOCATE][+ROUTER],... or all; see: methods"),
    ],
    json_out: Annotated[
        Path, typer.Option("--json", help="results, a JSON line each, only added to (.jsonl)")
    ],
    pruned: Annotated[str, typer.Option(help="shares of routed-expert parameters")] = "0.25,0.5",
    data: Annotated[
        str, typer.Option(help="calibration text: FILE, folder or hub id[:WEIGHT],...")
    ] = "tiny",
    samples: Samples = None,
    seq_len: SeqLen = None,
    evaluate: Annotated[
        str, typer.Option("--eval", help="held-out text: FILE,... ('tiny': four domains)")
    ] = "tiny",
    eval_samples: Annotated[
        int | None, typer.Option(help="windows a held-out file; default: all")
    ] = None,
    pairs: Annotated[
        Path | None, typer.Option(help="minimal pairs: FILE.jsonl[.gz], as for eval")
    ] = None,
    pairs_per_paradigm: Annotated[
        int | None, typer.Option(help="the first of each paradigm; default: all")
    ] = None,
    batch_size: BatchSize = None,
    reference: Reference = None,
    plot: Annotated[
        Path | None, typer.Option(help="loss increase against size, the best ones named (.png)")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="the tables as Markdown (.md)")] = None,
    seed: Annotated[int, typer.Option(help="draws windows and random scores")] = 0,
    device: Device = "auto",
) -> None:
    """Methods side by side: the same calibration text, the same evaluation, each with the
    allocation and the router rule of its paper, and random as a baseline.

    A run that was killed goes on; methods and budgets can be added to the same file later.
    """
    from flexmoe.comparison.inputs import CompareConfig
    from flexmoe.comparison.run import compare as run
    from flexmoe.comparison.tables import markdown as as_markdown
    from flexmoe.comparison.tables import note, screen
    from flexmoe.config import budget_list
    from flexmoe.progress import bar
    from flexmoe.reports.plots import check_plot, pareto_figure, save

    quiet()
    if plot is not None:
        check_plot(plot)
    for path in (plot, markdown):
        if path is not None:
            check_file(path)
    config = CompareConfig(
        methods=tuple(name.strip() for name in methods.split(",") if name.strip()),
        pruned=budget_list(pruned),
        data=data,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        evaluate=evaluate,
        eval_samples=eval_samples,
        pairs=pairs,
        pairs_per_paradigm=pairs_per_paradigm,
        reference=reference,
        seed=seed,
        device=device,
    )
    results = run(model, json_out, config, say=lambda line: say(line, style="yellow"), track=bar)
    for table in screen(results):
        say(table)
    say(note(results))
    if plot is not None:
        save(pareto_figure(results.rows), plot, f"{results.settings['model']}: methods compared")
    if markdown is not None:
        markdown.write_text(as_markdown(results))
