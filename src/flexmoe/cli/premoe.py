"""The commands of PreMoe: ``flexmoe profile | patterns | specialise``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexmoe.cli.common import BatchSize, Device, Model, SeqLen, quiet, say

PROFILE_EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe profile tiny --task books --data books.train

  flexmoe profile ./Qwen3-30B-A3B --task code --data code.jsonl.gz --store patterns/qwen3

  flexmoe profile ./larger-than-memory --task law --data law.jsonl --memory 24GiB
"""
SPECIALISE_EXAMPLES = """\
[bold]Examples[/bold]

  # a specialist

  flexmoe specialise tiny --tasks books --keep 0.5 -o tiny-books

  # a generalist

  flexmoe specialise tiny --tasks code,math,tech --keep 0.75 -o tiny-technical
"""
Store = Annotated[Path, typer.Option(help="folder with the patterns of one model")]


def profile(
    model: Model,
    task: Annotated[str, typer.Option(help="name of the pattern")],
    data: Annotated[
        str, typer.Option(help="text of the task: FILE, folder or hub id[:WEIGHT],...")
    ],
    method: Annotated[
        str, typer.Option(help="peu, tcess or another that scores experts; see: methods")
    ] = "peu",
    store: Store = Path("patterns"),
    samples: Annotated[
        int | None, typer.Option(help="windows that are scored; default: 128")
    ] = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = None,
    memory: Annotated[
        str | None,
        typer.Option(help="hold no more than this, as 8GiB: the model is read layer by layer"),
    ] = None,
    seed: Annotated[int, typer.Option(help="draws windows")] = 0,
    device: Device = "auto",
) -> None:
    """Find the experts that a task needs, and keep that as a pattern in a store."""
    from flexmoe.premoe import profile as run
    from flexmoe.progress import bar
    from flexmoe.reports.report import parse_bytes

    quiet()
    found = run(
        model,
        task,
        data,
        store=store,
        method=method,
        samples=samples,
        seq_len=seq_len,
        batch_size=batch_size,
        memory=None if memory is None else parse_bytes(memory),
        seed=seed,
        device=device,
        track=bar,
    )
    longest = found.reach[-1]
    say(
        f"{store}: '{task}', {len(found.score)} layers scored by {method} on "
        f"{found.recipe.samples} windows of {found.recipe.seq_len} tokens\n"
        f"prompts of {longest.tokens} tokens are known again within a distance of "
        f"{longest.distance:.3g} ({longest.prompts} held-out prompts)"
    )
    say(f"next: flexmoe specialise {model} --tasks {task} --keep 0.5 --store {store} -o DIR")


def patterns(store: Annotated[Path, typer.Argument(help="folder of a store")]) -> None:
    """List the patterns in a store: task, how they were scored, on what text, of which model."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from flexmoe.premoe import Store as Opened

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for name in ("task", "method", "text", "tokens", "model"):
        table.add_column(name, overflow="fold")
    for found in Opened(store).load_all():
        recipe = found.recipe
        tokens = f"{recipe.samples * recipe.seq_len:,}"
        table.add_row(found.task, recipe.method, recipe.data, tokens, recipe.base_model)
    say(table)


def specialise(
    model: Model,
    tasks: Annotated[
        str, typer.Option(help="one: a specialist; several, with commas: a generalist")
    ],
    keep: Annotated[float, typer.Option(help="share of the experts of every layer that stays")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to make")],
    store: Store = Path("patterns"),
) -> None:
    """Write a checkpoint with the experts that some tasks need, reading no others."""
    import torch

    from flexmoe.checkpoint import Checkpoint
    from flexmoe.headers import resolve
    from flexmoe.memory import MostHeld, gib, held
    from flexmoe.premoe import specialise as run
    from flexmoe.progress import bar
    from flexmoe.reports.report import count, size

    quiet()
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    cpu = torch.device("cpu")
    before = held(cpu)
    with MostHeld(cpu) as most:
        done = run(model, names, out, keep=keep, store=store, track=bar)
    whole = Checkpoint(resolve(model)).bytes
    say(
        f"{done.path}: {', '.join(names)}; {done.pruned:.2%} of the routed-expert parameters "
        f"pruned, {count(done.routed_parameters)} stay, {size(done.bytes)}\n"
        f"{size(done.read)} of the model's {size(whole)} were read, at most "
        f"{gib(most.bytes - before)} held beyond the {gib(before)} of the program\n"
        f"{done.checked} experts read back and compared with the masked model: largest difference "
        f"{done.max_difference:.1e} of the output"
    )
    say(f"next: flexmoe eval {done.path} --against {model}")
