"""Open a family, a plan, an export or a plain checkpoint as a model, and switch budgets live."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from flexmoe import elastic
from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.headers import EXPORT_NAME, read_json, resolve
from flexmoe.names import missing_parameters
from flexmoe.plan import JSON_NAME, Member, Plan, read_manifest
from flexmoe.routing.edits import choose_function
from flexmoe.routing.rules import check_rule, reroute
from flexmoe.shards import Source
from flexmoe.trace import check_weights

SPREAD = "spread"  # over all GPUs, the memory and the disk, as accelerate's device map has it


def pick_device(device: str = "auto") -> torch.device:
    """``auto`` is CUDA where there is one, else the CPU."""
    count = torch.cuda.device_count()
    if device == SPREAD:
        raise FlexmoeError(
            f"device '{SPREAD}' is for flexmoe eval: give compress and recover --memory or --shard"
        )
    if device == "auto":
        return torch.device("cuda" if count else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise FlexmoeError(
            f"no device '{device}': expected auto, cpu, cuda or cuda:0 ..."
        ) from None
    if found.type == "meta":
        raise FlexmoeError("device 'meta' holds no values: expected auto, cpu, cuda or cuda:0 ...")
    if found.type == "cuda" and (found.index or 0) >= count:
        raise FlexmoeError(
            f"device '{device}' asked for, but this machine has {count} CUDA devices"
        )
    return found


def input_device(device: str) -> torch.device:
    """Where the tokens go: as `pick_device`, but ``spread`` is possible."""
    return pick_device("auto" if device == SPREAD else device)


def find_folder(path: str | Path) -> Path:
    """The folder of a family, plan, export or checkpoint: local, ``tiny`` or a hub id."""
    local = Path(path).expanduser()
    return local if local.is_dir() else resolve(path)


def load_stock(
    path: str | Path, *, device: str = "auto", dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The checkpoint as transformers loads it, in eval mode. ``dtype`` ``auto`` is the
    checkpoint's own. With ``device`` ``spread`` accelerate deals the layers out over all GPUs and
    the memory, and those that fit nowhere are read from disk whenever it is their turn."""
    folder = resolve(path)
    stock = meta_model(folder)
    checkpoint, given = Checkpoint(folder), dict[str, Any]()
    if ragged := checkpoint.config.get("quantization_config"):
        if stock.config.model_type != checkpoint.config["model_type"]:
            # the text part of a multimodal model, whose own config does not have it
            given["config"] = stock.config
            stock.config.quantization_config = ragged
    else:  # ragged exports have names of their own
        missing_parameters(checkpoint, stock)
    target, offloaded = input_device(device), None
    place: dict[str, Any] = {} if target.type == "cpu" else {"device_map": target}
    if device == SPREAD:
        offloaded = TemporaryDirectory(prefix="flexmoe-")
        place = {"device_map": "auto", "offload_folder": offloaded.name}
    if not place:  # reading ahead would hold all experts twice: apart, and as one tensor
        os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    # never pickles, never code that comes with a checkpoint (which a stock class does not run)
    place |= {"dtype": dtype, "use_safetensors": True, **given}
    model = type(stock).from_pretrained(folder, **place).eval()
    model.flexmoe_offloaded = offloaded  # the folder lives as long as the model
    return model


def check_finite(model: nn.Module, prefix: str = "") -> None:
    """`FlexmoeError` naming a parameter with NaN or infinite values, whose name begins with
    ``prefix``. It reads all weights once, which in memory is quick beside any pass over data; from
    files it would not be."""
    for name, parameter in model.named_parameters(prefix):
        total = parameter.detach().sum(dtype=torch.float32)  # NaN and infinities are contagious
        if not torch.isfinite(total) and not torch.isfinite(parameter).all():
            bad = int((~torch.isfinite(parameter)).sum())
            raise FlexmoeError(
                f"{name} has {bad:,} values that are NaN or infinite: the checkpoint is damaged, "
                "download or make it again"
            )


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

    folder, source = find_folder(path), find_weights(path, base)
    if not (folder / JSON_NAME).is_file():
        _check_single(source, pruned)
        return load_stock(source, device=device, dtype=dtype)
    plan, ranked = Plan.load(folder), read_manifest(folder).ranked
    plan.widths(pruned or 0.0)  # refuse a share out of reach before the slow part
    model = load_stock(source, device=device, dtype=dtype)
    attach(model, plan, ranked=ranked)
    model.flexmoe_source = elastic.LoadedFrom(source, None if ranked else plan.order)
    if pruned:
        set_budget(model, pruned)
    return model


def find_weights(path: str | Path, base: str | Path | None = None) -> Path:
    """The folder with the weights of what `load` opens: that of ``path`` itself, or for a plan
    alone that of ``base``, by default the base model it names. `FlexmoeError` where ``base`` is not
    the plan's, or has no effect."""
    folder = find_folder(path)
    if not (folder / JSON_NAME).is_file():
        if base is not None:
            raise FlexmoeError(f"base is given, but '{path}' is no plan: it has no {JSON_NAME}")
        return resolve(folder)
    if read_manifest(folder).ranked and base is None:
        return folder
    return open_source(folder, Plan.load(folder), base).checkpoint.path


def open_source(folder: Path, plan: Plan, base: str | Path | None = None) -> Source:
    """The weights of the family or plan alone in ``folder``, see `find_weights`, and where in them
    channels are; they are not loaded."""
    if not read_manifest(folder).ranked:
        return check_base(plan, resolve(base or plan.recipe.base_model))
    if base is not None:
        raise FlexmoeError(f"'{folder}' is a family with weights of its own: leave base out")
    return Source.open(folder, plan)


def check_base(plan: Plan, folder: Path) -> Source:
    """The weights in ``folder``; a `FlexmoeError` unless they are the very ones that a plan alone
    was made for."""
    source = Source.open(folder, plan)
    check_weights(plan, source.checkpoint, source.layers)
    return source


def _check_single(folder: Path, pruned: float | None) -> None:
    about = folder / EXPORT_NAME
    found = read_json(about) if about.is_file() else {"pruned": 0.0, "achieved": 0.0}
    shares = [found[name] for name in ("pruned", "achieved") if name in found]
    if len(shares) < 2 or not all(isinstance(share, float | int) for share in shares):
        raise FlexmoeError(f"{about} does not say what was pruned: export again")
    if pruned is not None and all(abs(pruned - share) > 1e-9 for share in shares):
        raise FlexmoeError(
            f"'{folder}' is one member, pruned {shares[0]:g}, and cannot be opened at {pruned:g}: "
            "open the family it was exported from"
        )


def attach(model: PreTrainedModel, plan: Plan, *, ranked: bool) -> None:
    """Give a loaded model its plan, at budget 0; with ``ranked`` false its channels are put in
    order first."""
    layers = {layer.index: layer for layer in expert_layers(model)}
    plan.check_fits(model.config.model_type, {i: layer.shape for i, layer in layers.items()})
    for i, layer in layers.items():
        if not ranked:
            if layer.module.down_proj.is_meta:
                raise FlexmoeError(
                    "a plan alone cannot be put on a model of which parts are on disk: make a "
                    "family of it with flexmoe recover --mode closed-form --memory"
                )
            layer.permute_(plan.order[i])
    model.flexmoe_plan = plan
    set_budget(model, 0.0)


def set_budget(
    model: PreTrainedModel, pruned: float, router: str | None = None, release: bool = False
) -> Member:
    """Make ``model`` (from `load`) compute the member at ``pruned``, any share the plan reaches.

    Only width tables change, no weight is touched. At 0 the experts run the stock function again,
    so going anywhere and back gives the outputs of the stock model bit for bit. ``router`` is what
    becomes of the router where whole experts go (see `routing.rules`), by default what the plan
    says. With ``release`` the memory of all channels beyond this budget is given back
    (`flexmoe.release`, which says how much), and richer budgets are refused until
    `flexmoe.restore`. Returns the figures of the member.
    """
    plan = getattr(model, "flexmoe_plan", None)
    if plan is None:
        raise FlexmoeError(
            "this model has no budgets: open a family or a plan with flexmoe.load(path) "
            "(an export is one member of it)"
        )
    rule = router or plan.recipe.router
    check_rule(rule, plan.recipe.unit, bool(plan.constant))
    width = plan.widths(pruned)
    elastic.check_stored(model, width)
    for layer in expert_layers(model):
        layer.module.flexmoe_width_E = width[layer.index].tolist()
    reroute(model, rule, width, plan.constant)
    choose_function(model)
    if release:
        elastic.release(model)
    return plan.figures(pruned, width, rule)
