"""What the commands share: options and how they speak."""

from __future__ import annotations

from typing import Annotated, Any

import typer

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1 ... or auto: cuda where there is one")]
Model = Annotated[str, typer.Argument(help="folder, hub id, or 'tiny' (comes with flexmoe)")]
Samples = Annotated[int | None, typer.Option(help="windows of calibration text; default: 128")]
SeqLen = Annotated[
    int | None, typer.Option(help="tokens a window; default: a quarter of the context, <= 2048")
]
Reference = Annotated[
    str | None, typer.Option(help="second checkpoint, for methods that compare with one")
]
BatchSize = Annotated[
    int | None, typer.Option(help="windows a step; default: 4096 tokens, at most 8 windows")
]
MicroBatch = Annotated[
    int | None, typer.Option(help="windows on the device at a time; default: the whole batch")
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", help="recompute activations: less memory, a third slower")
]
Shard = Annotated[
    bool, typer.Option("--shard", help="split the model over the processes of torchrun (FSDP2)")
]
Router = Annotated[
    str | None,
    typer.Option(help="where whole experts go: keep, remove, constant; default: the family's own"),
]
Base = Annotated[str | None, typer.Option(help="weights for a plan alone: folder or hub id")]


def quiet() -> None:
    """Progress bars and warnings of libraries say nothing that ours do not."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def say(what: Any, style: str | None = None) -> None:
    """Print text or a table."""
    from rich.console import Console

    Console(markup=False, highlight=False).print(what, style=style)
