"""From patterns to a plan of whole experts, and to a checkpoint that holds no others."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from flexmoe.allocate import allocate_experts
from flexmoe.errors import FlexmoeError
from flexmoe.exporter import ExportReport, export
from flexmoe.files import refuse_existing
from flexmoe.plan import LayerRecord, Plan, Recipe
from flexmoe.premoe.pattern import Pattern
from flexmoe.premoe.store import FOLDER, Store, fingerprint_of
from flexmoe.progress import Track, silent


def specialise(
    model: str | Path,
    tasks: Sequence[str],
    out: str | Path,
    *,
    keep: float,
    store: str | Path = FOLDER,
    track: Track = silent,
) -> ExportReport:
    """Write ``model`` with the experts that ``tasks`` need most into ``out``, as a ragged export.

    ``keep`` is the share of experts that stays in every layer, see `compile_plan`. The router is
    left as it is; what it sends to a pruned expert contributes nothing. The model is never loaded:
    tensors go from file to file, and those of pruned experts are not read.
    """
    refuse_existing(out)
    opened = Store(store)
    plan = compile_plan(opened.load_all(tasks), keep)
    opened.check_weights(fingerprint_of(model), model)
    with TemporaryDirectory() as folder:
        plan.save(folder)
        pruned = plan.budgets[-1]
        return export(folder, out, pruned=pruned, layout="ragged", base=model, track=track)


def compile_plan(patterns: Sequence[Pattern], keep: float) -> Plan:
    """The plan that keeps the share ``keep`` of experts in every layer: a specialist of one
    pattern, a generalist of several.

    Experts stay by the mean of the patterns' scores, which are means over tokens: the paper's rule
    for a generalist (third version), the mean over the tokens of all domains' calibration sets, for
    sets of one size. Of sets that differ each counts the same here, so that a task with more text
    does not crowd out the others. The plan has the one budget beside 0.
    """
    if not 0 < keep <= 1:
        raise FlexmoeError(
            f"keep must lie above 0 and be at most 1, found {keep:g}: 0.5 keeps half of the experts"
        )
    first = patterns[0]
    for other in patterns[1:]:
        if other.recipe.method != first.recipe.method:
            raise FlexmoeError(
                f"'{first.task}' was profiled by {first.recipe.method}, '{other.task}' by "
                f"{other.recipe.method}: their scores cannot be averaged, profile one of them again"
            )
    score = {i: torch.stack([p.score[i] for p in patterns]).mean(0) for i in first.layers}
    pruned = round(1 - keep, 9)
    budgets = (0.0, pruned) if pruned else (0.0,)
    shapes = {i: layer.shape for i, layer in first.layers.items()}
    width = allocate_experts("layer", shapes, score, budgets)
    for i, layer in first.layers.items():
        _check_enough(i, layer, width[i][-1], keep)
    return Plan(
        layers=first.layers,
        order={i: _as_stored(layer) for i, layer in first.layers.items()},
        width=width,
        budgets=budgets,
        quantum=max(layer.channels for layer in first.layers.values()),
        recipe=_recipe(patterns, keep),
        bytes_full=first.bytes_full,
        bytes_per_parameter=first.bytes_per_parameter,
    )


def _check_enough(index: int, layer: LayerRecord, width_E: Tensor, keep: float) -> None:
    kept, needed = int((width_E > 0).sum()), layer.experts_per_token
    if kept < needed:
        one = layer.channels * layer.channel_parameters / layer.shape.parameters
        least = math.ceil((1 - (layer.experts - needed) * one) * 1e4) / 1e4
        raise FlexmoeError(
            f"keep {keep:g} leaves {kept} of {layer.experts} experts in layer {index}, where every "
            f"token is sent to {needed}: keep at least {least:g}"
        )


def _as_stored(layer: LayerRecord) -> Tensor:
    """The order [E, I] that leaves channels where they are."""
    return torch.arange(layer.channels, dtype=torch.int32).repeat(layer.experts, 1)


def _recipe(patterns: Sequence[Pattern], keep: float) -> Recipe:
    """What is recorded of a plan: the patterns' own recipe, with the tasks and text of all."""
    recipes = [pattern.recipe for pattern in patterns]
    thin = [
        {(i, e) for i, experts in recipe.thin_experts.items() for e in experts}
        for recipe in recipes
    ]
    in_all: dict[int, list[int]] = {}
    for i, e in sorted(set.intersection(*thin)):
        in_all.setdefault(i, []).append(e)
    hashes = [recipe.data_sha256 for recipe in recipes]
    several = hashlib.sha256("".join(hashes).encode()).hexdigest()
    return recipes[0].model_copy(
        update={
            "allocate": "layer",
            "settings": recipes[0].settings
            | {"tasks": ",".join(pattern.task for pattern in patterns), "keep": keep},
            "data": ",".join(recipe.data for recipe in recipes),
            "data_sha256": hashes[0] if len(hashes) == 1 else several,
            "samples": sum(recipe.samples for recipe in recipes),
            "seq_len": max(recipe.seq_len for recipe in recipes),
            "thin_experts": in_all,
        }
    )
