"""Which models one evaluation compares, from paths: nothing is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from flexmoe.checkpoint import EXPORT_NAME, Checkpoint, meta_model, read_json, resolve
from flexmoe.data import load_tokenizer
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.members import BASE, Key, Members, Shelf, fit_together
from flexmoe.family import find_folder, load, pick_device
from flexmoe.plan import JSON_NAME, Plan, read_manifest

MODEL = "model"


@dataclass(frozen=True)
class Compared:
    """``members`` by key, the base first; ``base`` is the key that the others are compared with,
    None where there is nothing to compare. ``budgets`` are the keys that are no other model;
    ``folder`` is where they are from, ``weights`` where their weights lie, ``against`` that of the
    base if it is another model. Those that do not fit in memory ``together`` are loaded in turn."""

    members: Members
    base: Key | None
    budgets: tuple[float, ...]
    plan: Plan | None
    folder: Path
    weights: Path
    against: Path | None
    together: bool
    shelf: Shelf
    tokenizer: Any
    settings: PreTrainedConfig
    device: torch.device

    def figures(self, key: Key) -> dict[str, Any]:
        """Sizes of a member; those of one that is not of a family once it was loaded."""
        if key != BASE and self.plan is not None:
            return self.plan.member(float(key)).model_dump()
        name, weights = (BASE, self.against) if key == BASE else (MODEL, self.weights)
        assert weights is not None
        share = {} if key == BASE else {"pruned": key}
        sizes = {"routed_parameters": self.shelf.routed[name], "bytes": Checkpoint(weights).bytes}
        return share | sizes


def compare(
    path: str | Path,
    pruned: Sequence[float] | None = None,
    *,
    base: str | Path | None = None,
    against: str | Path | None = None,
    with_base: bool = False,
    device: str = "auto",
) -> Compared:
    """The budgets ``pruned`` (None: all) of a family or plan (``base`` has the weights of a plan
    alone), or the one member that an export or checkpoint is; compared with the model ``against``
    or else with budget 0, if it is among them or ``with_base`` asks for it.

    Raises `FlexmoeError` for what does not fit together. On the CPU arithmetic is float32
    whatever the checkpoint's dtype: as fast there, and differences are not lost in rounding.
    """
    folder, place = find_folder(path), pick_device(device)
    plan = Plan.load(folder) if (folder / JSON_NAME).is_file() else None
    budgets = _budgets(path, folder, plan, pruned, with_base and against is None)
    weights = _weights(folder, base)
    settings = meta_model(weights).config
    tokenizer = load_tokenizer(weights, settings)
    dtype = torch.float32 if place.type == "cpu" else "auto"
    first = pruned[0] if pruned and plan is None else None
    loaders = {MODEL: partial(load, path, first, base=base, device=device, dtype=dtype)}
    other = None
    if against is not None:
        other = _weights(find_folder(against), None)
        _check_same_tokens(other, against, settings, tokenizer)
        loaders[BASE] = partial(load, against, device=device, dtype=dtype)
    elif with_base and plan is None:
        raise FlexmoeError(
            f"'{path}' is one member and there is nothing to compare it with: give the model it is "
            "from with --against"
        )
    together = other is None or fit_together((weights, other), device)
    shelf = Shelf(loaders, together=together)
    members: dict[Key, Any] = {BASE: shelf.member(BASE)} if other is not None else {}
    for share in budgets:
        members[share] = shelf.member(MODEL) if plan is None else shelf.budget(MODEL, share)
    own = 0.0 if plan is not None and 0.0 in budgets else None
    return Compared(
        members, own if other is None else BASE, budgets, plan, folder, weights, other, together,
        shelf, tokenizer, settings, place,
    )  # fmt: skip


def _weights(folder: Path, base: str | Path | None) -> Path:
    """Where the weights lie: of a plan alone in ``base``, or in the base model it names."""
    if (folder / JSON_NAME).is_file():
        manifest = read_manifest(folder)
        if not manifest.ranked:
            return resolve(base or manifest.recipe.base_model)
    return folder


def _budgets(
    path: str | Path,
    folder: Path,
    plan: Plan | None,
    asked: Sequence[float] | None,
    with_full: bool,
) -> tuple[float, ...]:
    """The budgets to measure; of a model that is one member the share it was exported at."""
    if plan is None:
        if asked is not None and len(asked) != 1:
            raise FlexmoeError(
                f"'{path}' is one member: --pruned has no effect on it, leave it out"
            )
        return (_exported_share(folder),)
    budgets = plan.budgets if asked is None else tuple(dict.fromkeys(asked))
    if with_full:
        budgets = tuple(sorted({0.0, *budgets}))
    for share in budgets:
        plan.widths(share)  # refuse a share out of reach before the slow part
    return budgets


def _exported_share(folder: Path) -> float:
    """The share an export was asked for; what it came to where one width cannot be as exact."""
    if not (folder / EXPORT_NAME).is_file():
        return 0.0
    about = read_json(folder / EXPORT_NAME)
    share = about.get("achieved" if about.get("layout") == "uniform" else "pruned")
    if not isinstance(share, float | int):
        raise FlexmoeError(f"{folder / EXPORT_NAME} does not say what was pruned: export again")
    return share


def _check_same_tokens(
    other: Path, against: str | Path, settings: PreTrainedConfig, tokenizer: Any
) -> None:
    theirs = meta_model(other).config
    sizes = [config.get_text_config().vocab_size for config in (settings, theirs)]
    if sizes[0] != sizes[1] or load_tokenizer(other, theirs).get_vocab() != tokenizer.get_vocab():
        raise FlexmoeError(
            f"'{against}' has another vocabulary ({sizes[1]} tokens) than the model ({sizes[0]}): "
            "their predictions cannot be compared. Give the model it was made from"
        )
