"""Evaluation: loss and perplexity on held-out text, per data file and budget."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel

from flexmoe.checkpoint import Checkpoint, resolve
from flexmoe.data import default_seq_len, evaluation_windows
from flexmoe.errors import FlexmoeError
from flexmoe.experts import routed_parameters
from flexmoe.exporter import EXPORT_NAME
from flexmoe.family import load, pick_device, set_budget
from flexmoe.plan import JSON_NAME, Plan, read_manifest
from flexmoe.progress import Track, silent
from flexmoe.statistics import token_loss

Row = dict[str, Any]


def evaluate(
    model: nn.Module, windows: Mapping[str, Tensor], *, batch_size: int = 8, track: Track = silent
) -> dict[str, Row]:
    """Loss of ``model`` as it is on windows [n, t] by name: ``tokens`` (predicted ones), ``nll``
    (nats a token) and ``perplexity`` of each."""
    work = [(name, batch) for name, ids in windows.items() for batch in ids.split(batch_size)]
    tokens = dict.fromkeys(windows, 0)
    nll = dict.fromkeys(windows, 0.0)
    for name, batch in track(work, "evaluate"):
        loss, predicted = _loss(model, batch)
        nll[name] += loss
        tokens[name] += predicted
    return {name: _result(nll[name], tokens[name]) for name in windows}


def _loss(model: nn.Module, batch: Tensor) -> tuple[float, int]:
    batch = batch.to(next(model.parameters()).device)
    with torch.no_grad():
        logits = model(input_ids=batch, use_cache=False).logits
    return float(token_loss(logits, batch)), batch[:, 1:].numel()


def _result(nll: float, tokens: int) -> Row:
    return {"tokens": tokens, "nll": nll / tokens, "perplexity": perplexity(nll / tokens)}


def perplexity(nll: float) -> float:
    """exp of a loss in nats; infinite where a float ends."""
    return math.exp(nll) if nll < 700 else math.inf


def mean_nll(results: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over data files (each counts the same) of the loss a token."""
    return sum(row["nll"] for row in results.values()) / len(results)


def budget_rows(
    model: PreTrainedModel,
    windows: Mapping[str, Tensor],
    budgets: Sequence[float],
    *,
    batch_size: int = 8,
    track: Track = silent,
) -> list[Row]:
    """A row for every budget and data file of a model that switches (see `flexmoe.load`)."""
    work = [
        (pruned, name, batch)
        for pruned in budgets
        for name, ids in windows.items()
        for batch in ids.split(batch_size)
    ]
    tokens = dict.fromkeys(((pruned, name) for pruned, name, _ in work), 0)
    nll = dict.fromkeys(tokens, 0.0)
    member = {}
    for pruned, name, batch in track(work, "evaluate"):
        if pruned not in member:
            member[pruned] = set_budget(model, pruned)
        loss, predicted = _loss(model, batch)
        nll[pruned, name] += loss
        tokens[pruned, name] += predicted
    return [
        {
            "pruned": pruned,
            "data": name,
            **_result(nll[pruned, name], tokens[pruned, name]),
            "routed_parameters": member[pruned].routed_parameters,
            "bytes": member[pruned].bytes,
        }
        for pruned, name in tokens
    ]


def evaluate_path(
    path: str | Path,
    *,
    data: str = "tiny",
    pruned: Sequence[float] | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    track: Track = silent,
) -> list[Row]:
    """Rows of a family or plan at the budgets ``pruned`` (None: all of its), or the one row a data
    file of an export or plain checkpoint.

    On the CPU the arithmetic is float32 whatever the checkpoint's dtype: as fast there, and
    differences between budgets are not lost in rounding.
    """
    folder = Path(path)
    switches = (folder / JSON_NAME).is_file()
    plan = Plan.load(folder) if switches else None
    if plan is not None:
        budgets = plan.budgets if pruned is None else tuple(pruned)
        for share in budgets:
            plan.widths(share)  # refuse a share out of reach before the slow part
    elif pruned is not None and len(pruned) != 1:
        raise FlexmoeError(f"'{path}' is one member: --pruned has no effect on it, leave it out")
    weights = resolve(path if plan is None else _weights(folder, plan, base))
    tokenizer = AutoTokenizer.from_pretrained(weights)
    config = AutoConfig.from_pretrained(weights)
    windows = evaluation_windows(
        data, tokenizer, samples=samples, seq_len=seq_len or default_seq_len(config)
    )
    dtype: torch.dtype | str = torch.float32 if pick_device(device).type == "cpu" else "auto"
    first = pruned[0] if pruned and plan is None else None
    model = load(path, first, base=base, device=device, dtype=dtype)
    if plan is not None:
        return budget_rows(model, windows, budgets, track=track)
    figures = {
        "pruned": _exported_share(folder),
        "routed_parameters": routed_parameters(model),
        "bytes": Checkpoint(weights).bytes,
    }
    results = evaluate(model, windows, track=track)
    return [{**figures, "data": name, **result} for name, result in results.items()]


def _exported_share(folder: Path) -> float:
    """The share an export was asked for; what it came to where one width cannot be as exact."""
    if not (folder / EXPORT_NAME).is_file():
        return 0.0
    about = json.loads((folder / EXPORT_NAME).read_text())
    return about["achieved" if about["layout"] == "uniform" else "pruned"]


def _weights(folder: Path, plan: Plan, base: str | Path | None) -> str | Path:
    return folder if read_manifest(folder).ranked else (base or plan.recipe.base_model)
