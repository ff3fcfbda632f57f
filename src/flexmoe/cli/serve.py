"""The command that serves: ``flexmoe serve``."""

from __future__ import annotations

import shlex
from typing import Annotated, Any

import typer

from flexmoe.cli.common import Base, Device, quiet

EXAMPLES = """\
[bold]Examples[/bold]

  # every budget is a model id

  flexmoe serve families/qwen3

  flexmoe serve families/qwen3 --budgets 0,20,40 --policy slo --ttft-ms 500 --tpot-ms 50

  # every task is one

  flexmoe serve ./Qwen3-30B-A3B --patterns patterns --keep 0.5

  flexmoe serve families/qwen3 --engine vllm -- --tensor-parallel-size 2 --max-model-len 8192
"""


def serve(
    family: Annotated[str, typer.Argument(help="family, plan alone, export, or checkpoint")],
    more: Annotated[
        list[str] | None, typer.Argument(help="after --: options of vLLM's own server")
    ] = None,
    engine: Annotated[
        str, typer.Option(help="vllm, transformers, or auto: vllm where it is installed")
    ] = "auto",
    budgets: Annotated[
        str | None, typer.Option(help="percent pruned: 0,20,40; default: all of the family")
    ] = None,
    default: Annotated[
        str | None, typer.Option(help="budget of requests that name none; default: the richest")
    ] = None,
    name: Annotated[str | None, typer.Option(help="model id; default: the folder's name")] = None,
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="FLEXMOE_API_KEY", help="key that clients must send"),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="slo: the default budget follows the load")
    ] = None,
    ttft_ms: Annotated[
        float | None, typer.Option(help="slo: 95 % get their first token within; default: 500")
    ] = None,
    tpot_ms: Annotated[
        float | None, typer.Option(help="slo: and each further one within; default: 50")
    ] = None,
    richest: Annotated[
        str | None, typer.Option(help="slo: no richer than; default: the richest budget")
    ] = None,
    poorest: Annotated[
        str | None, typer.Option(help="slo: no poorer than; default: the poorest budget")
    ] = None,
    max_body_mb: Annotated[float, typer.Option(help="largest request body, in MB")] = 8.0,
    kv_tokens: Annotated[
        int | None,
        typer.Option(help="transformers: tokens the KV cache holds; default: CPU 16384, GPU all"),
    ] = None,
    patterns: Annotated[
        str | None,
        typer.Option(help="store of flexmoe profile: its tasks are model ids too"),
    ] = None,
    keep: Annotated[
        float | None, typer.Option(help="share of the experts that each of these tasks keeps")
    ] = None,
    base: Base = None,
    device: Device = "auto",
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16")] = "auto",
) -> None:
    """Serve all budgets of one resident model, OpenAI-compatible; each is a model id."""
    from flexmoe.errors import FlexmoeError
    from flexmoe.serve.prepare import check_vllm, make_settings, pick_engine

    quiet()
    chosen = pick_engine(engine)
    if chosen == "transformers" and more:
        raise FlexmoeError(f"'{more[0]}' has no effect: options after -- are for --engine vllm")
    if chosen == "vllm" and kv_tokens is not None:
        raise FlexmoeError(
            "--kv-tokens is for --engine transformers: vLLM has --gpu-memory-utilization and "
            "others, after --"
        )
    settings = make_settings(
        family,
        budgets=budgets,
        default=default,
        name=name,
        policy=policy,
        ttft_ms=ttft_ms,
        tpot_ms=tpot_ms,
        richest=richest,
        poorest=poorest,
        max_body_mb=max_body_mb,
        host=host,
        port=port,
        api_key=api_key,
        kv_tokens=kv_tokens,
        patterns=patterns,
        keep=keep,
        base=base,
        device=device,
        dtype=dtype,
    )
    said = "\n".join(_lines(settings, chosen))
    if chosen == "vllm":
        from flexmoe.serve.vllm import compat
        from flexmoe.serve.vllm import launch as vllm

        compat.check_version()
        check_vllm(family)
        options = vllm.arguments(settings, more or [])
        typer.echo(said)
        vllm.launch(settings, options)
    else:
        from flexmoe.family import pick_device
        from flexmoe.serve import transformers_engine

        pick_device(device)
        typer.echo(said)
        transformers_engine.launch(settings, typer.echo)


def _lines(settings: Any, engine: str) -> list[str]:
    from flexmoe.reports.report import count, size

    budgets = settings.budgets
    lines = [f"{settings.model} with {engine}", "id, routed parameters, bytes as a ragged export"]
    for member in settings.members:
        kept = "" if member.kept is None else f"  keeps {member.kept:.1%} of the likelihood"
        figures = f"{count(member.routed_parameters):>8} {size(member.bytes):>9}"
        lines.append(f"  {budgets.id(member.budget):<24} {figures}{kept}")
    for task in settings.tasks:
        figures = f"{count(task.routed_parameters):>8} {size(task.bytes):>9}"
        lines.append(f"  {budgets.id(task.task):<24} {figures}  the experts of this task")
    if settings.tasks:
        lines.append(
            f"  {budgets.id('auto'):<24} the task nearest to the prompt, or the full model"
        )
    held = settings.members[0]
    lines.append(f"memory     {size(held.bytes)} of weights: those of the richest, shared by all")
    if budgets.id(settings.default) != budgets.name:
        lines.append(f"default    {budgets.name} is {budgets.id(settings.default)} now")
    if settings.slo:
        lines.append(
            f"policy     slo: TTFT {settings.slo.ttft_ms:g} ms, TPOT {settings.slo.tpot_ms:g} ms, "
            f"from {settings.slo.richest} to {settings.slo.poorest}"
        )
    address = f"http://{settings.host}:{settings.port}"
    lines.append(f"page       {address}/flexmoe/ui")
    if settings.host not in ("127.0.0.1", "localhost", "::1") and settings.api_key is None:
        lines.append("warning    other machines can use this and turn the dial: give --api-key")
    key = ' -H "Authorization: Bearer $FLEXMOE_API_KEY"' if settings.api_key else ""
    body = f'{{"model": "{budgets.ids[-1]}", "prompt": "Once upon", "max_tokens": 32}}'
    lines.append(
        f"try        curl {address}/v1/completions{key} -H 'Content-Type: application/json' "
        f"-d {shlex.quote(body)}"
    )
    return lines
