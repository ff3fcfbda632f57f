"""Open a family, a plan, an export or a plain checkpoint as a model, and switch budgets live."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from flexmoe.checkpoint import meta_model, resolve
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.plan import JSON_NAME, Member, Plan, read_manifest


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise FlexmoeError(f"device '{device}' asked for, but this machine has no CUDA device")
    return torch.device(device)


def load_stock(
    path: str | Path, *, device: str = "auto", dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The checkpoint as transformers loads it, in eval mode. ``dtype`` ``auto`` is the
    checkpoint's own."""
    folder = resolve(path)
    loader = type(meta_model(folder))
    return loader.from_pretrained(folder, dtype=dtype).to(pick_device(device)).eval()


def load(
    path: str | Path,
    pruned: float | None = None,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
) -> PreTrainedModel:
    """A model under its stock class.

    ``path`` is a family (opened at ``pruned``, by default 0, and switched by `set_budget`), a plan
    alone (its channels are put in order on top of ``base``, or of the base model it names), an
    export, or a plain checkpoint (these last two are what they are: ``pruned`` must fit).
    """
    import flexmoe.hf  # noqa: F401  ragged exports load through it

    folder = Path(path)
    if not (folder / JSON_NAME).is_file():
        if base is not None:
            raise FlexmoeError(f"base is given, but '{path}' is no plan: it has no {JSON_NAME}")
        _check_single(resolve(path), pruned)
        return load_stock(path, device=device, dtype=dtype)
    plan, ranked = Plan.load(folder), read_manifest(folder).ranked
    if ranked and base is not None:
        raise FlexmoeError(f"'{path}' is a family with weights of its own: leave base out")
    if pruned is not None:
        plan.widths(pruned)  # refuse a share out of reach before the slow part
    source = folder if ranked else (base or plan.recipe.base_model)
    model = load_stock(source, device=device, dtype=dtype)
    attach(model, plan, ranked=ranked)
    set_budget(model, pruned or 0.0)
    return model


def _check_single(folder: Path, pruned: float | None) -> None:
    about = folder / "flexmoe_export.json"
    member = json.loads(about.read_text())["pruned"] if about.is_file() else 0.0
    if pruned is not None and abs(pruned - member) > 1e-9:
        raise FlexmoeError(
            f"'{folder}' is one member, pruned {member:g}, and cannot be opened at {pruned:g}: "
            "open the family it was exported from"
        )


def attach(model: PreTrainedModel, plan: Plan, *, ranked: bool) -> None:
    """Give a loaded model its plan; with ``ranked`` false its channels are put in order first."""
    layers = {layer.index: layer for layer in expert_layers(model)}
    plan.check_fits(model.config.model_type, {i: layer.shape for i, layer in layers.items()})
    for i, layer in layers.items():
        if not ranked:
            layer.permute_(plan.order[i])
        stock = layer.module.config._experts_implementation
        if stock != "flexmoe":  # else a plan was attached before: what is beneath stays
            layer.module.flexmoe_stock = stock
        layer.module.flexmoe_width_E = None
    model.flexmoe_plan = plan
    model.set_experts_implementation("flexmoe")


def set_budget(model: nn.Module, pruned: float) -> Member:
    """Make ``model`` (from `load`) compute the member at ``pruned``, any share the plan reaches.

    Only the width tables change; no weight is touched, so going anywhere and back to 0 gives the
    outputs of budget 0 bit for bit, which are those of the stock model. Returns the figures.
    """
    plan = getattr(model, "flexmoe_plan", None)
    if plan is None:
        raise FlexmoeError(
            "this model has no budgets: open a family or a plan with flexmoe.load(path) "
            "(an export is one member of it)"
        )
    width = plan.widths(pruned)
    for layer in expert_layers(model):
        table = width[layer.index].tolist()
        full = all(w == layer.I for w in table)
        layer.module.flexmoe_width_E = None if full else table
    return plan.member(pruned)
