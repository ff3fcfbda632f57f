"""Evaluation: loss and perplexity on held-out text, per data file and budget."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from flexmoe.card import refresh_card
from flexmoe.checkpoint import EXPORT_NAME, Checkpoint, meta_model, resolve
from flexmoe.curve import check_can_save, make_curve, of_weights, save_curve
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
from flexmoe.losses import loss_rows, window_losses
from flexmoe.pairs import encode, pair_rows, read_pairs, right_pairs
from flexmoe.plan import JSON_NAME, Plan, read_manifest
from flexmoe.progress import Track, silent

Row = dict[str, Any]


def evaluate(
    model: nn.Module, windows: Mapping[str, Tensor], *, batch_size: int = 8, track: Track = silent
) -> dict[str, Row]:
    """Loss of ``model`` as it is on windows [n, t] by name: ``tokens`` (predicted ones), ``nll``
    (nats a token) and ``perplexity`` of each."""
    losses = window_losses(model, windows, [0.0], _as_it_is, batch_size=batch_size, track=track)
    return {name: _row(losses[0.0][name], ids) for name, ids in windows.items()}


def budget_rows(
    model: PreTrainedModel,
    windows: Mapping[str, Tensor],
    budgets: Sequence[float],
    *,
    batch_size: int = 8,
    track: Track = silent,
) -> list[Row]:
    """A row for every budget and data file of a model that switches (see `flexmoe.load`)."""
    figures: dict[float, Row] = {}

    def switch(pruned: float) -> None:
        figures[pruned] = set_budget(model, pruned).model_dump()

    losses = window_losses(model, windows, budgets, switch, batch_size=batch_size, track=track)
    return _rows(losses, windows, figures)


def _as_it_is(pruned: float) -> None:
    """The switch of a model that is one member."""


def _row(loss_N: Tensor, ids: Tensor) -> Row:
    nll = float(loss_N.mean())
    return {"tokens": ids[:, 1:].numel(), "nll": nll, "perplexity": perplexity(nll)}


def _rows(
    losses: Mapping[float, Mapping[str, Tensor]],
    windows: Mapping[str, Tensor],
    figures: Mapping[float, Row],
) -> list[Row]:
    return [
        {
            "pruned": pruned,
            "data": name,
            **_row(of_file[name], ids),
            "routed_parameters": figures[pruned]["routed_parameters"],
            "bytes": figures[pruned]["bytes"],
        }
        for pruned, of_file in losses.items()
        for name, ids in windows.items()
    ]


def perplexity(nll: float) -> float:
    """exp of a loss in nats; infinite where a float ends."""
    return math.exp(nll) if nll < 700 else math.inf


def mean_nll(results: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over data files (each counts the same) of the loss a token."""
    return sum(row["nll"] for row in results.values()) / len(results)


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure. ``data``: held-out text; ``pruned``: budgets of a family (None: all of
    its); ``samples``: windows a data file (None: all); ``seq_len``, ``batch_size``: None picks
    them; ``base``: weights for a plan alone; ``pairs``: a file of minimal pairs (see
    `read_pairs`), of each paradigm the first ``pairs_per_paradigm``; ``save``: keep the curve in
    the family's folder."""

    data: str = "tiny"
    pruned: Sequence[float] | None = None
    samples: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    base: str | Path | None = None
    device: str = "auto"
    pairs: str | Path | None = None
    pairs_per_paradigm: int | None = None
    save: bool = False


@dataclass(frozen=True)
class Measured:
    """What one run measured. ``rows``: a row a budget and data file. ``members``: a row a budget
    with its figures, what `loss_rows` gives and, under ``pairs``, what `pair_rows` gives (None
    without pairs). ``saved``: the file that holds the curve, if it was asked for."""

    rows: list[Row]
    members: list[Row]
    saved: Path | None = None


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
    file of an export or plain checkpoint. `measure` gives more."""
    config = EvaluateConfig(data, pruned, samples, seq_len, batch_size, base, device)
    return measure(path, config, track=track).rows


def measure(
    path: str | Path, config: EvaluateConfig | None = None, *, track: Track = silent
) -> Measured:
    """Evaluate a family, plan, export or plain checkpoint on text and, if asked, minimal pairs.

    Budgets are compared with budget 0 of the same run, where it is among them; with ``save`` it
    always is. On the CPU the arithmetic is float32 whatever the checkpoint's dtype: as fast
    there, and differences between budgets are not lost in rounding. What cannot work is refused
    with a `FlexmoeError` before the model loads.
    """
    config = config or EvaluateConfig()
    if config.pairs is None and config.pairs_per_paradigm is not None:
        raise FlexmoeError("--pairs-per-paradigm has no effect without --pairs FILE")
    folder = find_folder(path)
    plan = Plan.load(folder) if (folder / JSON_NAME).is_file() else None
    if config.save:
        check_can_save(path)
    weights, budgets = folder, _budgets(path, folder, plan, config)
    if plan is not None and not read_manifest(folder).ranked:
        weights = resolve(config.base or plan.recipe.base_model)
    settings = meta_model(weights).config
    length = pick_seq_len(config.seq_len, settings)
    size = pick_batch_size(config.batch_size, length)
    pairs = [] if config.pairs is None else read_pairs(config.pairs, config.pairs_per_paradigm)
    tokenizer = load_tokenizer(weights, settings)
    windows = _windows(tokenizer, settings, length, config)
    encoded = encode(pairs, tokenizer, settings) if pairs else None
    made_of = of_weights(folder, track) if config.save else None

    dtype = torch.float32 if pick_device(config.device).type == "cpu" else "auto"
    first = config.pruned[0] if config.pruned and plan is None else None
    model = load(path, first, base=config.base, device=config.device, dtype=dtype)
    switch: Any = _as_it_is if plan is None else lambda pruned: set_budget(model, pruned)
    figures = (
        {budgets[0]: _figures(budgets[0], weights, model)}
        if plan is None
        else {pruned: plan.member(pruned).model_dump() for pruned in budgets}
    )
    losses = window_losses(model, windows, budgets, switch, batch_size=size, track=track)
    of_pairs: dict[float, Row] = {}
    if encoded is not None:
        step = size * length  # what fits for text fits for pairs
        right = right_pairs(model, encoded, budgets, switch, tokens_per_step=step, track=track)
        of_pairs = pair_rows(pairs, right)
    of_text = loss_rows(losses)
    members = [{**figures[b], **of_text[b], "pairs": of_pairs.get(b)} for b in budgets]
    saved = None
    if made_of is not None:
        curve = make_curve(
            made_of,
            model,
            members,
            data=config.data,
            windows=windows,
            pairs=config.pairs,
            pairs_per_paradigm=config.pairs_per_paradigm,
        )
        saved = save_curve(folder, curve)
        refresh_card(folder, curve)
    return Measured(_rows(losses, windows, figures), members, saved)


def _budgets(
    path: str | Path, folder: Path, plan: Plan | None, config: EvaluateConfig
) -> tuple[float, ...]:
    """The budgets to measure; of a model that is one member the share it was exported at."""
    asked = config.pruned
    if plan is None:
        if asked is not None and len(asked) != 1:
            raise FlexmoeError(
                f"'{path}' is one member: --pruned has no effect on it, leave it out"
            )
        return (_exported_share(folder),)
    budgets = plan.budgets if asked is None else tuple(dict.fromkeys(asked))
    if config.save:  # the curve says what is lost: to what?
        budgets = tuple(sorted({0.0, *budgets}))
    for share in budgets:
        plan.widths(share)  # refuse a share out of reach before the slow part
    return budgets


def _windows(
    tokenizer: Any, settings: PreTrainedConfig, length: int, config: EvaluateConfig
) -> dict[str, Tensor]:
    windows = evaluation_windows(config.data, tokenizer, samples=config.samples, seq_len=length)
    for ids in windows.values():
        check_tokens(ids, settings)
    return windows


def _figures(pruned: float, weights: Path, model: PreTrainedModel) -> Row:
    return {
        "pruned": pruned,
        "routed_parameters": routed_parameters(model),
        "bytes": Checkpoint(weights).bytes,
    }


def _exported_share(folder: Path) -> float:
    """The share an export was asked for; what it came to where one width cannot be as exact."""
    if not (folder / EXPORT_NAME).is_file():
        return 0.0
    about = json.loads((folder / EXPORT_NAME).read_text())
    return about["achieved" if about["layout"] == "uniform" else "pruned"]
