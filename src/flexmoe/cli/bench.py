"""The commands ``flexmoe bench``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexmoe.cli.common import quiet, say

if TYPE_CHECKING:
    from flexmoe.kernels.measure import Shape

EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe bench kernels

  flexmoe bench kernels --shape 128,2048,768,8 --tokens 1,8 --dtype bfloat16 -o kernels.json
"""

app = typer.Typer(no_args_is_help=True)


@app.callback()
def bench() -> None:
    """Speed of what flexmoe runs, against what you would run instead."""


@app.command(epilog=EXAMPLES)
def kernels(
    shape: Annotated[
        list[str] | None, typer.Option(help="E,H,I,K: experts, hidden, channels, experts a token")
    ] = None,
    tokens: Annotated[str, typer.Option(help="tokens of a batch, several with commas")] = (
        "1,8,64,512"
    ),
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or both")] = "both",
    repeats: Annotated[int, typer.Option(help="rounds of which the median is taken", min=1)] = 7,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="JSON file to write")] = None,
) -> None:
    """Ragged experts on this CPU, one thread, in ms: transformers, vLLM where it is installed, and
    flexmoe at full width, at a mean of 50 % (10 to 90 %), and with three budgets in a batch.

    "x roof" is the time at 50 % over what the machine's arithmetic or memory would take for the
    work left; "mixed" three budgets in one batch over a batch for each.
    """
    from flexmoe.errors import did_you_mean
    from flexmoe.kernels.measure import DTYPES, SHAPES, measure

    quiet()
    known = {str(d).removeprefix("torch."): (d,) for d in DTYPES} | {"both": DTYPES}
    if dtype not in known:
        raise did_you_mean(dtype, known, "dtype")
    found = measure(
        shapes=tuple(map(_shape, shape)) if shape else SHAPES,
        tokens=_numbers(tokens, "--tokens"),
        dtypes=known[dtype],
        repeats=repeats,
        progress=lambda row: say(line(row)),
    )
    machine = found["machine"]
    rates = ", ".join(f"{n} {r / 1e9:.0f} GFLOP/s" for n, r in machine["flop_per_s"].items())
    say(f"machine: {rates}, reads {machine['bytes_per_s'] / 1e9:.1f} GB/s")
    say(f"switch of 48 layers of 128 experts: {found['switch_s'] * 1e3:.2f} ms")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    """A measured row in short."""
    E, H, I, K = row["shape"].values()
    times = ", ".join(f"{name} {s * 1e3:.2f}" for name, s in row["seconds"].items())
    seconds, half = row["seconds"], row["work"]["50 % ragged"]
    roof = seconds["50 % ragged"] / half["roof_s"]
    mixed = seconds["three budgets"] / seconds["three batches"]
    return (
        f"E{E} H{H} I{I} top-{K} {row['dtype']} T={row['T']}: {times} ms; "
        f"x roof {roof:.2f}, mixed {mixed:.2f}"
    )


def _shape(text: str) -> Shape:
    from flexmoe.errors import FlexmoeError
    from flexmoe.kernels.measure import Shape

    numbers = _numbers(text, "--shape")
    if len(numbers) != 4 or numbers[3] > numbers[0]:
        raise FlexmoeError(
            f"--shape '{text}' is not E,H,I,K: experts, hidden, channels of an expert and experts "
            "per token (at most E), such as 64,2048,1024,8"
        )
    return Shape(*numbers)


def _numbers(text: str, option: str) -> tuple[int, ...]:
    from flexmoe.errors import FlexmoeError

    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise FlexmoeError(f"{option} '{text}': expected whole numbers from 1 with commas between")
    return numbers
