"""The command ``flexmoe recover``."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from flexmoe.cli.common import (
    Base,
    BatchSize,
    Checkpointing,
    Device,
    MicroBatch,
    SeqLen,
    Shard,
    quiet,
    say,
)

EXAMPLES = """\
[bold]Examples[/bold]

  # all budgets, by distillation

  flexmoe recover families/tiny -o families/tiny-2

  # one forward pass, no training

  flexmoe recover families/tiny -o families/tiny-2 --mode closed-form

  torchrun --nproc-per-node 8 -m flexmoe recover families/qwen3 -o families/qwen3-2 --shard
"""


def recover(
    family: Annotated[Path, typer.Argument(help="family folder, or a plan alone")],
    out: Annotated[Path, typer.Option("-o", "--out", help="family folder to make")],
    mode: Annotated[str, typer.Option(help="full, lora, router or closed-form")] = "full",
    scheme: Annotated[
        str | None,
        typer.Option(help="family: all budgets (default); sp: one; cp: sandwich (the paper's)"),
    ] = None,
    at: Annotated[float | None, typer.Option(help="recover at this one budget (scheme sp)")] = None,
    labels: Annotated[
        float | None,
        typer.Option(help="weight of the next token beside the teacher (family); default: 0.1"),
    ] = None,
    data: Annotated[
        str, typer.Option(help="text: FILE, folder or hub id[:WEIGHT],...; default: tiny")
    ] = "tiny",
    tokens: Annotated[
        int | None,
        typer.Option(help="tokens to read; default: 1.2 million, router half, closed-form 131,072"),
    ] = None,
    seq_len: SeqLen = None,
    batch_size: BatchSize = None,
    micro_batch: MicroBatch = None,
    lr: Annotated[float | None, typer.Option(help="highest learning rate")] = None,
    rank: Annotated[int | None, typer.Option(help="rank of mode lora; default: 16")] = None,
    checkpointing: Checkpointing = False,
    shard: Shard = False,
    memory: Annotated[
        str | None,
        typer.Option(help="hold no more than this, as 8GiB: closed-form goes layer by layer"),
    ] = None,
    seed: Annotated[int, typer.Option(help="draws windows and members")] = 0,
    base: Base = None,
    device: Device = "auto",
) -> None:
    """Better weights for all budgets of a family, same plan: goes on where a killed run stopped."""
    from flexmoe.family import pick_device
    from flexmoe.memory import MostHeld, gib
    from flexmoe.progress import bar, silent
    from flexmoe.recover import Prepared
    from flexmoe.recover import recover as run
    from flexmoe.recover_config import RecoverConfig
    from flexmoe.reports.report import count, parse_bytes, size
    from flexmoe.training import process_group, processes

    quiet()
    limit = None if memory is None else parse_bytes(memory)
    with process_group(device) as place:
        config = RecoverConfig(
            mode=mode,
            scheme=scheme,
            at=at,
            labels=labels,
            data=data,
            tokens=tokens,
            seq_len=seq_len,
            batch_size=batch_size,
            micro_batch=micro_batch,
            lr=lr,
            rank=rank,
            checkpointing=checkpointing,
            seed=seed,
            device=place,
            shard=shard,
            memory=limit,
        )
        first, world = processes()[0] == 0, processes()[1]

        def announce(ready: Prepared) -> None:
            if not first:
                return
            done = f"{ready.schedule.steps} steps of {ready.schedule.batch_size} windows"
            needed = f"needs about {size(ready.memory // (world if shard else 1))} on the device"
            say(
                f"{mode}: {count(ready.trained)} parameters change, {ready.ids.numel():,} tokens "
                + ("read once; " if mode == "closed-form" else f"in {done}; ")
                + (f"{needed} beside activations" if limit is None else "layer by layer")
            )

        track = bar if first else silent
        most = MostHeld(pick_device(place))
        with nullcontext() if limit is None else most:
            run(family, out, config, base=base, announce=announce, track=track)
        if limit is not None:
            say(f"at most {gib(most.bytes)} of memory were held, {gib(limit)} were allowed")
        if first:
            say(f"{out}: same plan, new weights\nnext: flexmoe eval {out} --save")
