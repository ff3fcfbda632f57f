"""Evaluation: loss and perplexity on held-out text, per data file and budget."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexmoe.checkpoint import EXPORT_NAME, Checkpoint, meta_model, resolve
from flexmoe.data import (
    check_tokens,
    evaluation_windows,
    load_tokenizer,
    pick_batch_size,
    pick_seq_len,
)
from flexmoe.errors import FlexmoeError
from flexmoe.experts import routed_parameters
from flexmoe.family import find_folder, load, pick_device, set_budget
from flexmoe.plan import JSON_NAME, Member, Plan, read_manifest
from flexmoe.progress import Track, silent
from flexmoe.statistics import token_loss

Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)


def evaluate(
    model: nn.Module, windows: Mapping[str, Tensor], *, batch_size: int = 8, track: Track = silent
) -> dict[str, Row]:
    """Loss of ``model`` as it is on windows [n, t] by name: ``tokens`` (predicted ones), ``nll``
    (nats a token) and ``perplexity`` of each."""
    work = [(name, batch) for name, ids in windows.items() for batch in ids.split(batch_size)]
    return _losses(model, work, lambda name: None, track)


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
        ((pruned, name), batch)
        for pruned in budgets
        for name, ids in windows.items()
        for batch in ids.split(batch_size)
    ]
    member: dict[float, Member] = {}

    def switch(key: tuple[float, str]) -> None:
        if key[0] not in member:
            member[key[0]] = set_budget(model, key[0])

    return [
        {
            "pruned": pruned,
            "data": name,
            **result,
            "routed_parameters": member[pruned].routed_parameters,
            "bytes": member[pruned].bytes,
        }
        for (pruned, name), result in _losses(model, work, switch, track).items()
    ]


def _losses(
    model: nn.Module,
    work: Sequence[tuple[Key, Tensor]],
    before: Callable[[Key], None],
    track: Track,
) -> dict[Key, Row]:
    """Loss over all batches of each key; ``before(key)`` is called before each of them."""
    device = next(model.parameters()).device
    nll, tokens = dict.fromkeys((key for key, _ in work), 0.0), dict.fromkeys(dict(work), 0)
    for key, batch in track(work, "evaluate"):
        before(key)
        batch = batch.to(device)
        with torch.no_grad():
            nll[key] += float(token_loss(model(input_ids=batch, use_cache=False).logits, batch))
        tokens[key] += batch[:, 1:].numel()
    return {
        key: {
            "tokens": tokens[key],
            "nll": nll[key] / tokens[key],
            "perplexity": perplexity(nll[key] / tokens[key]),
        }
        for key in nll
    }


def perplexity(nll: float) -> float:
    """exp of a loss in nats; infinite where a float ends."""
    return math.exp(nll) if nll < 700 else math.inf


def mean_nll(results: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over data files (each counts the same) of the loss a token."""
    return sum(row["nll"] for row in results.values()) / len(results)


def evaluate_path(
    path: str | Path,
    *,
    data: str = "tiny",
    pruned: Sequence[float] | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    base: str | Path | None = None,
    device: str = "auto",
    track: Track = silent,
) -> list[Row]:
    """Rows of a family or plan at the budgets ``pruned`` (None: all of its), or the one row a data
    file of an export or plain checkpoint.

    On the CPU the arithmetic is float32 whatever the checkpoint's dtype: as fast there, and
    differences between budgets are not lost in rounding.
    """
    folder = find_folder(path)
    plan = Plan.load(folder) if (folder / JSON_NAME).is_file() else None
    weights = folder
    if plan is not None:
        budgets = plan.budgets if pruned is None else tuple(pruned)
        for share in budgets:
            plan.widths(share)  # refuse a share out of reach before the slow part
        if not read_manifest(folder).ranked:
            weights = resolve(base or plan.recipe.base_model)
    elif pruned is not None and len(pruned) != 1:
        raise FlexmoeError(f"'{path}' is one member: --pruned has no effect on it, leave it out")
    config = meta_model(weights).config
    length = pick_seq_len(seq_len, config)
    size = pick_batch_size(batch_size, length)
    windows = evaluation_windows(
        data, load_tokenizer(weights, config), samples=samples, seq_len=length
    )
    for ids in windows.values():
        check_tokens(ids, config)
    dtype = torch.float32 if pick_device(device).type == "cpu" else "auto"
    first = pruned[0] if pruned and plan is None else None
    model = load(path, first, base=base, device=device, dtype=dtype)
    if plan is not None:
        return budget_rows(model, windows, budgets, batch_size=size, track=track)
    figures = {
        "pruned": _exported_share(folder),
        "routed_parameters": routed_parameters(model),
        "bytes": Checkpoint(weights).bytes,
    }
    results = evaluate(model, windows, batch_size=size, track=track)
    return [{**figures, "data": name, **result} for name, result in results.items()]


def _exported_share(folder: Path) -> float:
    """The share an export was asked for; what it came to where one width cannot be as exact."""
    if not (folder / EXPORT_NAME).is_file():
        return 0.0
    about = json.loads((folder / EXPORT_NAME).read_text())
    return about["achieved" if about["layout"] == "uniform" else "pruned"]
