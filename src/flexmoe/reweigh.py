"""Another mixture of the sources of a family: a new plan from kept statistics, without a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flexmoe.allocate import PRIMARY, allocate, allocate_experts, order_of
from flexmoe.checkpoint import meta_model
from flexmoe.config import SETTINGS_OF
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.evidence import Evidence
from flexmoe.experts import expert_layers
from flexmoe.family import find_folder, load_stock
from flexmoe.files import refuse_existing, written_beside
from flexmoe.methods import Method, find_method, score_layers
from flexmoe.plan import Plan
from flexmoe.prepare import check_groups
from flexmoe.routing.rules import mean_outputs
from flexmoe.sources import COMMA, Source, split_weight
from flexmoe.statistics import LayerStatistics, Statistics, thin_experts


def reweigh(
    family: str | Path, data: str, out: str | Path, *, allocator: str = "global"
) -> tuple[Plan, Evidence]:
    """Write the plan alone ``out`` for the sources of ``family`` weighted as ``data`` says
    (``a:3,b:1``; those left out do not count), and return it with the evidence that it rests on.

    Scores by the family's method, budgets as in the family. It applies to the family's base model.
    """
    if allocator in SETTINGS_OF:
        raise FlexmoeError(
            f"allocate '{allocator}' needs a run on the text: use {', '.join(PRIMARY)}, or flexmoe "
            "compress"
        )
    if allocator not in PRIMARY:
        raise did_you_mean(allocator, PRIMARY, "allocator")
    refuse_existing(out)
    folder = find_folder(family)
    plan = Plan.load(folder)
    if plan.recipe.recovery:
        raise FlexmoeError(
            f"'{family}' has recovered weights, which are fitted to its plan: give the family it "
            "was recovered from"
        )
    check_groups(plan.recipe.router_groups, allocator)
    method = find_method(plan.recipe.method, anew=True)
    if method.passes > 1 or method.reference or method.learns:
        raise FlexmoeError(
            f"method '{method.name}' needs more than sums that can be weighed anew: compress again "
            "with the other --data"
        )
    evidence = Evidence.load(folder, plan.recipe.data_sha256)
    weight = _weights(data, evidence)
    score = _scores(method, plan, folder, evidence.mixed(weight))
    shapes = {i: layer.shape for i, layer in plan.layers.items()}
    settings = {k: v for k, v in plan.recipe.settings.items() if not k.startswith("learn_")}
    chosen = evidence.only(weight)
    if method.unit == "expert":
        groups, order = plan.recipe.router_groups, plan.order
        K = {i: layer.experts_per_token for i, layer in plan.layers.items()}
        width = allocate_experts(allocator, shapes, score, plan.budgets, groups, K)
    else:
        order = {i: order_of(s) for i, s in score.items()}
        width = allocate(allocator, shapes, score, plan.budgets, plan.quantum)
    new = replace(
        plan,
        order=order,
        width=width,
        constant=mean_outputs(evidence.mixed(weight)) if plan.constant else {},
        recipe=plan.recipe.model_copy(
            update={
                "allocate": allocator,
                "options": None,  # no command makes it from the base model alone
                "settings": settings | {"reweighed": data},
                "thin_experts": thin_experts(chosen.mixed()),
            }
        ),
    )
    with written_beside(out) as partial:
        new.save(partial)
    return new, chosen


def _weights(data: str, evidence: Evidence) -> dict[str, float]:
    """Weights by the names of the sources; files may be given as they were to `compress`."""
    found: dict[str, float] = {}
    for part in filter(None, (p.strip() for p in COMMA.split(data))):
        name, number = split_weight(part)
        name = name if name in evidence.sources else Source(name).name
        if name not in evidence.sources:
            raise did_you_mean(name, evidence.sources, "source of this family")
        if name in found:
            raise FlexmoeError(f"source '{name}' is given twice: give it once, with its weight")
        found[name] = float(number or 1)
    if not found:
        raise FlexmoeError(f"--data is empty: weigh some of {', '.join(evidence.sources)}")
    return found


def _scores(
    method: Method, plan: Plan, folder: Path, statistics: Statistics
) -> Mapping[int, Tensor]:
    """Scores [E, I] in the order of the base model's channels, which is that of the statistics, or
    [E]; the weights that a method may read stand in the family's order."""
    order = {i: order.long() for i, order in plan.order.items()}
    ranked: Statistics = {}
    for i, stats in statistics.items():
        values = {
            name: value.gather(1, order[i]) if name.endswith("_EI") else value
            for name, value in stats.values.items()
        }
        ranked[i] = LayerStatistics(values, stats.tokens, stats.batches, stats.seed)
    try:
        score = score_layers(method, expert_layers(meta_model(folder)), ranked)
    except FlexmoeError as error:
        if not isinstance(error.__cause__, NotImplementedError):
            raise
        # what has no data cannot be read: the method looks at weights
        model = load_stock(folder, device="cpu")
        score = score_layers(method, expert_layers(model), ranked)
    if method.unit == "expert":
        return score
    return {i: s.gather(1, order[i].argsort(1)) for i, s in score.items()}
