"""From what was asked for to `ServeSettings`: everything that can be wrong is found here, before
anything is loaded."""

from __future__ import annotations

import importlib.util
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.evaluation.curve import load_curve
from flexmoe.experts import routed_parameters
from flexmoe.family import find_folder, find_weights
from flexmoe.headers import EXPORT_NAME, read_json, resolve
from flexmoe.kernels import check_forced
from flexmoe.plan import JSON_NAME, Plan, read_manifest
from flexmoe.serve.engine import ServedMember, ServeSettings, Slo
from flexmoe.serve.ids import Budgets, label

ENGINES = ("vllm", "transformers")
INSTALL = {"vllm": "pip install 'flexmoe[vllm]'", "transformers": "pip install 'flexmoe[serve]'"}
NEEDED = {"vllm": ("vllm",), "transformers": ("fastapi", "uvicorn", "openai", "prometheus_client")}
DTYPES = ("auto", "float32", "bfloat16", "float16")
TTFT_MS, TPOT_MS = 500.0, 50.0


def pick_engine(asked: str) -> str:
    """The engine's name; ``auto`` is vLLM where that is installed. A `FlexmoeError` says what to
    install."""
    if asked == "auto":
        return "vllm" if _installed("vllm") else pick_engine("transformers")
    if asked not in ENGINES:
        raise did_you_mean(asked, ("auto", *ENGINES), "engine")
    if not _installed(asked):
        raise FlexmoeError(f"--engine {asked} is not installed: {INSTALL[asked]}")
    return asked


def _installed(engine: str) -> bool:
    return all(importlib.util.find_spec(module) is not None for module in NEEDED[engine])


def check_port(host: str, port: int) -> None:
    """`FlexmoeError` unless a server can listen there."""
    if not 0 < port < 65536:
        raise FlexmoeError(f"--port {port}: expected a number from 1 to 65535")
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0], found[1]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        raise FlexmoeError(
            f"cannot listen on {host} port {port}: {error.strerror or error}. Give another --port "
            "or --host"
        ) from None


def served_members(path: str, budgets: str | None) -> tuple[ServedMember, ...]:
    """The members at ``path`` that ``budgets`` names in percent (None: all), rich to poor. An
    export or a plain checkpoint is one."""
    folder = find_folder(path)
    if not (folder / JSON_NAME).is_file():
        if budgets is not None:
            raise FlexmoeError(f"--budgets has no effect: '{path}' is one member, not a family")
        return (_single(resolve(folder)),)
    plan = Plan.load(folder)
    plan.check_router_kept("a server switches widths and no routers")
    known = Budgets("family", plan.budgets)
    asked = known.labels if budgets is None else [b.strip() for b in budgets.split(",")]
    shares = sorted({known.share(budget) for budget in asked})
    quality, figures = _quality(folder), {"pruned", "routed_parameters", "bytes"}
    return tuple(
        ServedMember.model_validate(
            {**plan.member(share).model_dump(include=figures), **quality.get(share, {})}
        )
        for share in shares
    )


def _single(folder: Path) -> ServedMember:
    about = read_json(folder / EXPORT_NAME) if (folder / EXPORT_NAME).is_file() else {}
    routed = routed_parameters(meta_model(folder))
    if about.get("layout") != "uniform":  # the config of others says the widths before
        routed = round(routed * (1 - about.get("achieved", 0.0)))
    return ServedMember(
        pruned=about.get("pruned", 0.0),
        routed_parameters=routed,
        bytes=Checkpoint(folder).bytes,
    )


def check_vllm(model: str) -> None:
    """`FlexmoeError` for an export that vLLM has no place for."""
    about = find_folder(model) / EXPORT_NAME
    if about.is_file() and read_json(about).get("router") == "constant":
        raise FlexmoeError(
            f"'{model}' has constants in the place of experts, which --engine vllm cannot add: use "
            "--engine transformers"
        )


def _quality(folder: Path) -> dict[float, dict[str, float]]:
    """Loss and share of likelihood kept by budget, where a curve of this plan is saved. (That the
    weights are those it was measured with is not checked: that takes reading them all.)"""
    curve = load_curve(folder)
    if curve is None or curve.of.plan_sha256 != read_manifest(folder).tensors_sha256:
        return {}
    return {point.pruned: {"nll": point.nll, "kept": point.kept} for point in curve.budgets}


def make_slo(
    policy: str | None,
    ttft_ms: float | None,
    tpot_ms: float | None,
    richest: str | None,
    poorest: str | None,
    members: Sequence[ServedMember],
) -> Slo | None:
    """The policy's settings, None without one; a `FlexmoeError` for those that have no effect or
    make no sense."""
    given = {
        "--ttft-ms": ttft_ms,
        "--tpot-ms": tpot_ms,
        "--richest": richest,
        "--poorest": poorest,
    }
    if policy is None:
        for option, value in given.items():
            if value is not None:
                raise FlexmoeError(f"{option} has no effect without --policy slo")
        return None
    if policy != "slo":
        raise did_you_mean(policy, ("slo",), "policy")
    for option in ("--ttft-ms", "--tpot-ms"):
        value = given[option]
        if isinstance(value, float) and not 0 < value < float("inf"):
            raise FlexmoeError(f"{option} {value:g}: expected milliseconds above 0")
    budgets = Budgets("family", tuple(member.pruned for member in members))
    rich, poor = richest or budgets.labels[0], poorest or budgets.labels[-1]
    if budgets.share(rich) >= budgets.share(poor):
        raise FlexmoeError(
            f"the policy has nowhere to go: --richest {rich} must prune less than --poorest {poor}"
        )
    return Slo(ttft_ms=ttft_ms or TTFT_MS, tpot_ms=tpot_ms or TPOT_MS, richest=rich, poorest=poor)


def make_settings(
    family: str,
    *,
    budgets: str | None = None,
    default: str | None = None,
    name: str | None = None,
    policy: str | None = None,
    ttft_ms: float | None = None,
    tpot_ms: float | None = None,
    richest: str | None = None,
    poorest: str | None = None,
    max_body_mb: float = 8.0,
    patterns: str | None = None,
    keep: float | None = None,
    **others: Any,
) -> ServeSettings:
    """Settings to serve ``family`` with, checked; ``others`` are fields of `ServeSettings`.

    ``default`` is by default the richest budget, ``name`` the folder's name or the hub id;
    ``patterns`` a pattern store, whose tasks ``keep`` that share of the experts.
    """
    check_forced()
    check_port(others["host"], others["port"])
    if others["dtype"] not in DTYPES:
        raise did_you_mean(others["dtype"], DTYPES, "dtype")
    max_body = round(max_body_mb * 10**6) if 0 < max_body_mb < float("inf") else 0
    if max_body < 1:
        raise FlexmoeError(f"--max-body-mb {max_body_mb:g}: expected a number above 0")
    if others["kv_tokens"] is not None and others["kv_tokens"] < 1:
        raise FlexmoeError(f"--kv-tokens {others['kv_tokens']}: expected a number from 1 on")
    if name == "":
        raise FlexmoeError("--name is empty: give a model id, or leave it out")
    key = others["api_key"]
    if key is not None and (not key or any(not "!" <= c <= "~" for c in key)):
        # without the key in it: what a server says is kept in logs
        found = "has signs that no header can carry" if key else "is empty"
        raise FlexmoeError(
            f"--api-key {found}: expected ASCII letters, digits and signs, no spaces"
        )
    if (patterns is None) != (keep is None):
        raise FlexmoeError(
            "--patterns STORE and --keep SHARE go together: tasks keep that share of the experts"
        )
    members = served_members(family, budgets)
    find_weights(family, others["base"])
    if patterns is not None and keep is not None:
        from flexmoe.serve.tasks import served_tasks

        others |= {
            "patterns": str(Path(patterns).expanduser().absolute()),
            "keep": keep,
            "tasks": served_tasks(family, patterns, keep, members),
        }
    local = Path(family).expanduser()
    settings = ServeSettings(
        model=str(local.absolute() if local.is_dir() else family),
        name=name or (local.resolve().name if local.is_dir() else family),
        members=members,
        default=default or label(members[0].pruned),
        slo=make_slo(policy, ttft_ms, tpot_ms, richest, poorest, members),
        max_body=max_body,
        **others,
    )
    settings.budgets.share(settings.default)
    return settings
