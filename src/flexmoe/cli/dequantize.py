"""The command ``flexmoe dequantize``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flexmoe.cli.common import quiet, say

EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe dequantize openai/gpt-oss-20b -o gpt-oss-20b-bf16

  flexmoe compress gpt-oss-20b-bf16 -o families/gpt-oss-20b
"""


def dequantize(
    model: Annotated[str, typer.Argument(help="quantized checkpoint: folder or hub id")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder to make")],
) -> None:
    """Write a checkpoint in FP8 or MXFP4 in bfloat16, from which all other commands can start.

    It is written tensor by tensor, read back and compared; the model is never loaded.
    """
    from flexmoe.checkpoint import Checkpoint
    from flexmoe.dequantize import dequantize as run
    from flexmoe.progress import bar
    from flexmoe.reports.report import size

    quiet()
    made = run(model, out, track=bar)
    say(f"{made}: {size(Checkpoint(made).bytes)} in bfloat16, read back and compared")
