"""Another mixture of the sources of a family: a new plan from kept statistics, without a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flexmoe.allocate import allocate, order_of
from flexmoe.checkpoint import meta_model
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.evidence import Evidence
from flexmoe.experts import expert_layers
from flexmoe.family import find_folder, load_stock
from flexmoe.files import refuse_existing, written_beside
from flexmoe.methods import find_method, score_layers
from flexmoe.plan import Plan
from flexmoe.sources import COMMA, Source, split_weight
from flexmoe.statistics import LayerStatistics, Statistics, thin_experts

ALLOCATORS = ("global", "layer", "uniform")


def reweigh(
    family: str | Path, data: str, out: str | Path, *, allocator: str = "global"
) -> tuple[Plan, Evidence]:
    """Write the plan alone ``out`` for the sources of ``family`` weighted as ``data`` says
    (``a:3,b:1``; those left out do not count), and return it with the evidence that it rests on.

    Scores by the family's method, budgets as in the family. It applies to the family's base model.
    """
    if allocator not in ALLOCATORS:
        if allocator in ("learned", "actions"):
            raise FlexmoeError(
                f"allocate '{allocator}' needs a run on the text: use {', '.join(ALLOCATORS)}, or "
                "flexmoe compress"
            )
        raise did_you_mean(allocator, ALLOCATORS, "allocator")
    refuse_existing(out)
    folder = find_folder(family)
    plan = Plan.load(folder)
    if plan.recipe.recovery:
        raise FlexmoeError(
            f"'{family}' has recovered weights, which are fitted to its plan: give the family it "
            "was recovered from"
        )
    evidence = Evidence.load(folder, plan.recipe.data_sha256)
    weight = _weights(data, evidence)
    score = _scores(plan, folder, evidence.mixed(weight))
    settings = {k: v for k, v in plan.recipe.settings.items() if not k.startswith("learn_")}
    chosen = evidence.only(weight)
    new = replace(
        plan,
        order={i: order_of(s) for i, s in score.items()},
        width=allocate(
            allocator,
            {i: layer.shape for i, layer in plan.layers.items()},
            score,
            plan.budgets,
            plan.quantum,
        ),
        recipe=plan.recipe.model_copy(
            update={
                "allocate": allocator,
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


def _scores(plan: Plan, folder: Path, statistics: Statistics) -> Mapping[int, Tensor]:
    """Scores [E, I] in the order of the base model's channels, which is that of the statistics;
    the weights that a method may read stand in the family's order."""
    method = find_method(plan.recipe.method)
    order = {i: order.long() for i, order in plan.order.items()}
    ranked: Statistics = {}
    for i, stats in statistics.items():
        values = {n: v.gather(1, order[i]) if v.dim() == 2 else v for n, v in stats.values.items()}
        ranked[i] = LayerStatistics(values, stats.tokens, stats.batches, stats.seed)
    try:
        score = score_layers(method, expert_layers(meta_model(folder)), ranked)
    except NotImplementedError:  # what has no data cannot be read: the method looks at weights
        model = load_stock(folder, device="cpu")
        score = score_layers(method, expert_layers(model), ranked)
    return {i: s.gather(1, order[i].argsort(1)) for i, s in score.items()}
