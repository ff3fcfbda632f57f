"""The commands ``flexmoe bench kernels`` and ``flexmoe bench model``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flexmoe.cli.common import Device, quiet, say

if TYPE_CHECKING:
    from flexmoe.kernels.measure import Shape

EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe bench kernels

  flexmoe bench kernels --shape 128,2048,768,8 --tokens 1,8 --dtype bfloat16 -o kernels.json
"""
MODEL_EXAMPLES = """\
[bold]Examples[/bold]

  flexmoe bench model families/qwen3

  flexmoe bench model families/qwen3 --pruned 0,0.4 --batch 1,8 --prompt 512 --json speed.json

  flexmoe bench model qwen3-40-ragged --against Qwen/Qwen3-30B-A3B
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
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or both (the default); on a GPU bfloat16")
    ] = None,
    repeats: Annotated[int, typer.Option(help="rounds of which the median is taken", min=1)] = 7,
    device: Device = "auto",
    out: Annotated[Path | None, typer.Option("-o", "--out", help="JSON file to write")] = None,
) -> None:
    """Ragged experts in ms, at full width, at means of 80, 60, 50 and 40 %, and with three budgets
    in a batch. On a CPU, one thread, beside transformers and vLLM where it is installed; on a GPU
    beside torch's grouped_mm, in CUDA graphs.

    "x roof" is the time at 50 % over what the machine's arithmetic or memory would take for the
    work left; "mixed" three budgets in one batch over a batch for each.
    """
    from flexmoe.errors import FlexmoeError, did_you_mean
    from flexmoe.family import pick_device
    from flexmoe.files import check_file
    from flexmoe.kernels import measure as on_cpu
    from flexmoe.kernels import measure_gpu as on_gpu

    quiet()
    known = {str(d).removeprefix("torch."): (d,) for d in on_cpu.DTYPES} | {"both": on_cpu.DTYPES}
    if dtype is not None and dtype not in known:
        raise did_you_mean(dtype, known, "dtype")
    if out is not None:
        check_file(out)
    counts, where = _numbers(tokens, "--tokens"), pick_device(device)
    usual = on_cpu.SHAPES if where.type == "cpu" else on_gpu.SHAPES
    shapes = tuple(map(_shape, shape)) if shape else usual
    if where.type == "cpu":
        dtypes = known[dtype or "both"]
        found = on_cpu.measure(shapes, counts, dtypes, repeats, lambda row: say(line(row)))
    elif dtype in (None, "bfloat16"):
        found = on_gpu.measure(
            shapes, counts, repeats, lambda row: say(line(row)), device=str(where)
        )
    else:
        raise FlexmoeError(f"--dtype {dtype}: on a GPU bfloat16 is measured; or --device cpu")
    machine = found["machine"]
    rates = ", ".join(f"{n} {r / 1e9:.0f} GFLOP/s" for n, r in machine["flop_per_s"].items())
    say(f"machine: {rates}, reads {machine['bytes_per_s'] / 1e9:.1f} GB/s")
    say(f"switch of 48 layers of 128 experts: {found['switch_s'] * 1e3:.2f} ms")
    if out:
        out.write_text(json.dumps(found, indent=1) + "\n")


@app.command(epilog=MODEL_EXAMPLES)
def model(
    path: Annotated[str, typer.Argument(help="family, plan, export, or any MoE checkpoint")],
    batch: Annotated[str, typer.Option(help="sequences at once, several with commas")] = "1,8,64",
    prompt: Annotated[int, typer.Option(help="tokens of each prompt", min=1)] = 128,
    new: Annotated[int, typer.Option(help="tokens after it", min=1)] = 16,
    repeats: Annotated[int, typer.Option(help="rounds of which the median is taken", min=1)] = 5,
    pruned: Annotated[str, typer.Option(help="budgets of a family: 0,0.4 or all")] = "all",
    against: Annotated[
        str | None, typer.Option(help="unpruned model to compare an export with")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
    device: Device = "auto",
    json_out: Annotated[Path | None, typer.Option("--json", help="JSON file to write")] = None,
) -> None:
    """A whole model at every budget: time to the first token and per further one, tokens per
    second, memory; beside the unpruned model as transformers runs it (eager, grouped_mm).
    """
    from flexmoe.config import budget_list
    from flexmoe.errors import did_you_mean
    from flexmoe.files import check_file
    from flexmoe.speed import SpeedConfig, measure

    quiet()
    if dtype not in (known := ("auto", "float32", "bfloat16", "float16")):
        raise did_you_mean(dtype, known, "dtype")
    config = SpeedConfig(
        batches=_numbers(batch, "--batch"),
        prompt=prompt,
        new=new,
        repeats=repeats,
        pruned=None if pruned == "all" else budget_list(pruned),
        device=device,
        dtype=dtype,
    )
    if json_out is not None:
        check_file(json_out)
    found = measure(path, config, against)
    say(_table(path, found))
    if json_out is not None:
        json_out.write_text(json.dumps({"model": path, **found}, indent=1) + "\n")


def _table(path: str, found: dict[str, Any]) -> Any:
    from rich.table import Table

    from flexmoe.memory import gib

    table = Table(
        box=None,
        title=f"{path}, {found['dtype']}, prompts of {found['prompt']} tokens",
        caption=f"tokens/s of the batch; {found['clock']}, medians of {found['repeats']} rounds",
    )
    head = "engine|pruned|batch|TTFT ms|TPOT ms|prefill/s|decode/s|weights"
    for n, name in enumerate(head.split("|")):
        table.add_column(name, justify="right" if n else "left")
    for row in found["rows"]:
        table.add_row(
            row["engine"],
            f"{100 * row['pruned']:g} %",
            str(row["batch"]),
            f"{row['ttft_s'] * 1e3:.1f}",
            f"{row['tpot_s'] * 1e3:.2f}",
            f"{row['prefill_tokens_per_s']:,.0f}",
            f"{row['decode_tokens_per_s']:,.0f}",
            gib(row["weights"]),
        )
    return table


def line(row: dict[str, Any]) -> str:
    """A measured row in short."""
    E, H, I, K = row["shape"].values()
    times = ", ".join(f"{name} {s * 1e3:.2f}" for name, s in row["seconds"].items())
    seconds, half = row["seconds"], "50 % ragged"
    least_s = row["roof_s"][half] if "roof_s" in row else row["work"][half]["roof_s"]
    roof = seconds[half] / least_s
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
