"""What each part of the recipe is worth: the ablations that a reader of the paper asks for.

    python bench/ablations.py tiny --seed 0

criterion   every scoring method, cut globally and as the start of the learned widths
actions     the paper's action training with 4, 9 and 17 actions an expert
widths      the learned widths, the same widths shuffled among the experts of a layer, one for all
samples     windows of calibration text, for the global cut and the learned widths
point       recovery at one budget (the paper's `sp`) at 20, 40 or 60 %, and over the family

Like family.py: the same calibration and held-out windows for all, a row is kept as soon as it is
measured and not measured twice (results/ablations.json).
"""

from __future__ import annotations

import argparse
import dataclasses
import time

import torch
from torch import Tensor
from transformers.utils import logging

from common import RESULTS
from family import SHARES, Bench, distilled, learned_plan, put_back
from flexmoe.actions import ActionConfig
from flexmoe.config import CompressConfig
from flexmoe.pipeline import attach_plan, make_plan
from flexmoe.plan import Plan
from flexmoe.progress import bar

METHODS = ("fisher", "taylor", "heapr", "camera", "magnitude", "random")
ACTION_SETS = {4: (0.1, 0.4, 0.7, 1.0)} | {
    count: tuple(round(k / (count - 1), 4) for k in range(count)) for count in (9, 17)
}
SAMPLES = (32, 64, 128, 256, 512)
POINTS = (0.2, 0.4, 0.6)


def criterion(bench: Bench) -> None:
    """Which score ranks the channels."""
    for method in METHODS:
        for allocator in ("global", "learned"):
            measure(bench, f"criterion: {method}, {allocator}", method=method, allocate=allocator)


def samples(bench: Bench) -> None:
    """How much calibration text there is. Learning draws from it as many tokens in any case."""
    for count in SAMPLES:
        for allocator in ("global", "learned"):
            measure(bench, f"samples: {count}, {allocator}", samples=count, allocate=allocator)


def actions(bench: Bench) -> None:
    """How fine the actions of the paper's training are."""
    for count, shares in ACTION_SETS.items():
        # an expert that keeps nothing is an action too, but the paper's poorest keeps a tenth
        learn = ActionConfig(actions=tuple(max(share, 0.02) for share in shares))
        measure(bench, f"actions: {count}", allocate="actions", learn=learn)


def measure(bench: Bench, recipe: str, **changes) -> None:
    """Rank, plan and evaluate with these settings, unless it was done before."""
    if bench.skips(recipe):
        return
    asked = CompressConfig(method=changes.get("method", "fisher"), allocate=changes["allocate"])
    if not asked.needs_data:  # weights only
        changes |= dict.fromkeys(("data", "samples", "seq_len", "batch_size"))
    ranked = bench.rank(**changes)
    start = time.monotonic()
    plan = make_plan(ranked, changes["allocate"], bar)
    bench.keep(recipe, bench.losses(ranked, plan, SHARES), time.monotonic() - start)


def widths(bench: Bench) -> None:
    """Is it the widths, or the order inside the experts: same order, other widths."""
    names = [f"widths: {name}" for name in ("learned", "shuffled", "uniform")]
    if all(bench.skips(name) for name in names):
        return
    ranked, plan, _ = learned_plan(bench)
    for name, width in zip(
        names, (plan.width, shuffled(plan, bench.seed), uniform(plan)), strict=True
    ):
        changed = dataclasses.replace(plan, width=width)
        bench.keep(name, bench.losses(ranked, changed, SHARES), 0.0)


def shuffled(plan: Plan, seed: int) -> dict[int, Tensor]:
    """The widths of a layer handed to other experts of it, the same at every budget."""
    generator = torch.Generator().manual_seed(seed)
    return {
        i: width[:, torch.randperm(width.shape[1], generator=generator)]
        for i, width in plan.width.items()
    }


def uniform(plan: Plan) -> dict[int, Tensor]:
    """Every expert of the model keeps the same share, as near as whole blocks allow."""
    found = {}
    for i, width in plan.width.items():
        full = plan.layers[i].channels
        rows = [
            spread(round((1 - pruned) * width.shape[1] * full / plan.quantum), width.shape[1])
            * plan.quantum
            for pruned in plan.budgets
        ]
        found[i] = torch.stack(rows).to(width.dtype)
    return found


def spread(blocks: int, experts: int) -> Tensor:
    """So many blocks over the experts, the first ones get those that are left over."""
    each, rest = divmod(blocks, experts)
    return torch.tensor([each + (e < rest) for e in range(experts)])


def point(bench: Bench, tokens: int) -> None:
    """Which budget is recovered, all weights, same plan and tokens."""
    runs = [(f"point: {at:.0%}", "sp", at) for at in POINTS] + [("point: family", "family", 0.4)]
    if all(bench.skips(name) for name, _, _ in runs):
        return
    ranked, plan, _ = learned_plan(bench)
    attach_plan(ranked, plan)
    begin = {name: p.detach().clone() for name, p in ranked.model.named_parameters()}
    for name, scheme, at in runs:
        if not bench.skips(name):
            start = time.monotonic()
            more = distilled(bench, ranked, plan, "full", scheme, tokens, at)
            seconds = time.monotonic() - start
            bench.keep(name, bench.losses(ranked, plan, (0.0, *SHARES)), seconds, **more)
            put_back(ranked, begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="'tiny' or a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=400_000, help="for recovery")
    asked = parser.parse_args()
    logging.disable_progress_bar()
    bench = Bench(asked.model, asked.seed, RESULTS / "ablations.json")
    widths(bench)
    criterion(bench)
    point(bench, asked.tokens)
    samples(bench)
    actions(bench)


if __name__ == "__main__":
    main()
