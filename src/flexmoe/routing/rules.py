"""Router rules: what becomes of the router when whole experts go.

``keep``: it stays as it is, so tokens are still sent to experts that are gone, which add nothing.
``remove``: it forgets them and chooses among the others, as if they had never been (rows and
correction biases sliced). ``constant``: it stays, and an expert that is gone adds its mean output
over the calibration text instead, times its routing weight (MoNE, arXiv 2507.00390, "novices").

Here a rule is applied to a model in memory, to be evaluated or served before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import ExpertLayer, expert_layers
from flexmoe.routing.counts import Counts, builder, find_counts
from flexmoe.routing.edits import Edit, Routed
from flexmoe.statistics import Statistics

if TYPE_CHECKING:
    from flexmoe.plan import Plan, Recipe

RULES = ("keep", "remove", "constant")
MEAN = ("output_EH",)  # the statistic that `constant` needs beside the method's own


def check_rule(rule: str, unit: str, with_constants: bool = True) -> None:
    """`FlexmoeError` unless ``rule`` can go with a plan of this ``unit``."""
    if rule not in RULES:
        raise did_you_mean(rule, RULES, "router rule")
    if rule != "keep" and unit != "expert":
        raise FlexmoeError(
            f"router rule '{rule}' is of whole experts, this plan cuts channels of all of them: "
            "use keep, or a method of whole experts (see: flexmoe methods)"
        )
    if rule == "constant" and not with_constants:
        raise FlexmoeError(
            "the plan has no mean outputs of experts for the router rule 'constant': compress with "
            "--router constant"
        )


def rule_of_export(recipe: Recipe, layout: str, router: str | None, with_constants: bool) -> str:
    """The router rule of an export in a layout: ``router``, or what the plan's recipe says. A
    `FlexmoeError` where the layout cannot have it."""
    rule = router or recipe.router
    check_rule(rule, recipe.unit, with_constants)
    if rule == "constant" and layout != "ragged":
        raise FlexmoeError(
            f"layout {layout} is a stock checkpoint, which has no place for what experts that are "
            "gone add by the router rule 'constant': use --layout ragged, or another --router"
        )
    if layout == "uniform" and recipe.unit == "expert" and rule == "keep":
        raise FlexmoeError(
            "layout uniform of whole experts takes them out of the router, which gives other "
            "outputs than --router keep: add --router remove (and measure it: flexmoe eval FAMILY "
            "--router remove), or use the layouts ragged or masked"
        )
    if layout != "uniform" and rule == "remove":
        raise FlexmoeError(
            f"layout {layout} keeps the router as it is: use --layout uniform with --router "
            "remove, or add --router keep"
        )
    return rule


def export_options(plan: Plan, pruned: float) -> str:
    """The options of an export with the plan's own widths at a budget. Experts leave the router in
    the stock layout alone, whose config has one number of experts for all layers: where they are
    not as many in each, the router stays."""
    if plan.recipe.router != "remove":
        return "--layout ragged"
    alike = {int((width_E > 0).sum()) for width_E in plan.widths(pruned).values()}
    return "--layout uniform" if len(alike) == 1 else "--layout ragged --router keep"


def mean_outputs(statistics: Statistics) -> dict[int, Tensor]:
    """Mean output [E, H] of every expert over its tokens, before its routing weight; zeros for one
    that had none."""
    return {i: stats.mean(MEAN[0]).float() for i, stats in statistics.items()}


def kept_experts(counts: Counts, gone_E: Tensor, layer: int) -> Tensor:
    """The experts that stay, rising; a `FlexmoeError` where the router cannot do without the
    others."""
    per_group = (~gone_E).view(counts.groups, -1).sum(1)
    if not int(per_group.sum()):
        raise FlexmoeError(
            f"layer {layer} would keep no expert, and a router must choose one: prune less, or use "
            "--router keep"
        )
    if int(per_group.min()) != int(per_group.max()):
        raise FlexmoeError(
            f"layer {layer}: this router chooses within {counts.groups} groups of experts, which "
            f"must stay equally large, and would keep {per_group.tolist()} of them: compress with "
            "--router remove"
        )
    return (~gone_E).nonzero()[:, 0]


def check_table(name: str, tensor: Tensor, counts: Counts) -> None:
    """`FlexmoeError` if a tensor beside the experts names them by number."""
    whole = not (tensor.is_floating_point() or tensor.dtype == torch.bool)
    if whole and tensor.numel() > 1 and int(tensor.max()) > 1 and int(tensor.max()) < counts.E:
        raise FlexmoeError(
            f"{name} sends tokens to experts by their numbers, none of them can be removed: use "
            "--router keep"
        )


def reroute(
    model: PreTrainedModel,
    rule: str,
    width: Mapping[int, Tensor],
    constant: Mapping[int, Tensor],
) -> None:
    """Apply a rule to a model in memory whose experts have widths [E]; those of width 0 are gone.
    What an earlier call did is undone first. ``constant`` has the mean outputs [E, H]."""
    restore(model)
    if rule == "remove":
        _remove(model, {i: width_E == 0 for i, width_E in width.items()})
    for layer in expert_layers(model) if rule == "constant" else ():
        if not bool(width[layer.index].all()):
            down, constant_EH = layer.module.down_proj, constant[layer.index].float()
            if not down.is_meta:  # else the layer is on disk until its turn
                constant_EH = constant_EH.to(down.device)
            layer.module.flexmoe_constant_EH = constant_EH


def restore(model: PreTrainedModel) -> None:
    """The router as it was before any rule."""
    for path, block in model.__dict__.pop("flexmoe_blocks", {}).items():
        model.set_submodule(path, block)
    for layer in expert_layers(model):
        for name in ("flexmoe_renumber", "flexmoe_constant_EH"):
            layer.module.__dict__.pop(name, None)


def _remove(model: PreTrainedModel, gone: Mapping[int, Tensor]) -> None:
    if not any(bool(gone_E.any()) for gone_E in gone.values()):
        return
    if "flexmoe_counts" not in model.__dict__:  # the same for every budget
        model.__dict__["flexmoe_counts"] = find_counts(model.config.to_dict(), builder(model))
    counts: Counts = model.__dict__["flexmoe_counts"]
    kept = {i: kept_experts(counts, gone_E, i) for i, gone_E in gone.items() if gone_E.any()}
    smaller = {n: counts.model(n) for n in {len(kept_n) for kept_n in kept.values()}}
    blocks = {}
    for layer in expert_layers(model):
        if layer.index in kept:
            path, kept_n = counts.blocks[layer.index], kept[layer.index]
            blocks[path] = _smaller(layer, counts, smaller[len(kept_n)], kept_n)
    before = {path: model.get_submodule(path) for path in blocks}
    for path, block in blocks.items():
        model.set_submodule(path, block)
    model.__dict__["flexmoe_blocks"] = before
    for layer in expert_layers(model):
        if layer.index in kept:
            layer.module.flexmoe_renumber = _numbers(kept[layer.index])


def _numbers(kept_n: Tensor) -> Edit:
    """From the numbers of a smaller router to those of the experts as they stand in memory."""

    def edit(routed: Routed) -> Routed:
        nonlocal kept_n
        kept_n = kept_n.to(routed.index_TK.device)  # the layer's, which need not be the model's
        return Routed(kept_n[routed.index_TK], routed.weight_TK, routed.E)

    return edit


def _smaller(layer: ExpertLayer, counts: Counts, like: nn.Module, kept_n: Tensor) -> nn.Module:
    """The block of ``layer`` with the router of the smaller model ``like`` and rows of the tensors
    that stand in memory; the experts and all other tensors are the same objects."""
    path = counts.blocks[layer.index]
    assert layer.model is not None
    block, old = deepcopy(like.get_submodule(path)), layer.model.get_submodule(path)
    block.train(old.training)
    stands: dict[str, Any] = dict(old.named_parameters()) | dict(old.named_buffers())
    inside = layer.name.removeprefix(f"{path}.")
    for name, tensor in stands.items():
        if name.startswith(f"{inside}."):
            continue
        check_table(f"{path}.{name}", tensor, counts)
        axis = counts.rows[layer.index].get(f"{path}.{name}")
        if axis is not None:
            rows = tensor.detach().index_select(axis, kept_n.to(tensor.device))
            tensor = nn.Parameter(rows, False) if isinstance(tensor, nn.Parameter) else rows
        owner, _, leaf = name.rpartition(".")
        held = block.get_submodule(owner)
        (held._parameters if isinstance(tensor, nn.Parameter) else held._buffers)[leaf] = tensor
    block.set_submodule(inside, layer.module)
    return block
