"""Held-out loss of methods, allocators and settings of the paper's learning on the shipped model.

    python bench/quality.py            # writes results/quality.json (about 15 minutes on two cores)

One pass of statistics feeds all methods; every plan is evaluated on the same held-out windows of
four domains in the same process. The base loss stands beside the increases.
"""

from __future__ import annotations

import dataclasses
import sys

import torch
from transformers.utils import logging

from common import save
from flexmoe.actions import ActionConfig
from flexmoe.data import evaluation_windows, load_tokenizer
from flexmoe.evaluation.evaluate import budget_rows, evaluate, mean_nll
from flexmoe.methods import all_methods
from flexmoe.pipeline import CompressConfig, Ranked, attach_plan, make_plan, rank_channels
from flexmoe.progress import bar

SHARES = (0.2, 0.4, 0.6, 0.8)
SCORED = ("uniform", "layer", "global")
LEARNED = {
    "300 steps": {},
    "150 steps": {"steps": 150},
    "150 steps, load floor 0.3": {"steps": 150, "load_floor": 0.3},
    "150 steps, no entropy term": {"steps": 150, "beta": (0.0, 0.0)},
    "150 steps, 17 actions": {
        "steps": 150,
        "actions": tuple(i / 16 for i in range(17)),
        "margin": 5.0,
    },
}
CONFIG = CompressConfig(data="tiny", samples=128, seq_len=256, pruned=SHARES, allocate="global")


def main() -> None:
    logging.disable_progress_bar()
    only = sys.argv[1:]
    rows: list[dict] = []
    methods = all_methods().items()
    known = {name for name, method in methods if not method.reference and name != "naee"}
    for name in [n for n in sorted(known) if not only or n in only]:
        config = dataclasses.replace(CONFIG, method=name)
        if not config.needs_data:
            config = dataclasses.replace(config, data=None, samples=None, seq_len=None)
        ranked = rank_channels("tiny", config, bar)
        windows, base = held_out(ranked)
        scored = SCORED if ranked.recipe.unit == "channel" else SCORED[1:]
        rows += [measure(ranked, name, a, a, base, windows) for a in scored]
    if not only or "learned" in only:
        ranked = rank_channels("tiny", dataclasses.replace(CONFIG, samples=512), bar)
        windows, base = held_out(ranked)
        for name, settings in LEARNED.items():
            learn = dataclasses.replace(ActionConfig(), **settings)
            ranked.config = dataclasses.replace(ranked.config, allocate="actions", learn=learn)
            rows.append(measure(ranked, "fisher", "actions", f"learned: {name}", base, windows))
    if not only:
        tokens = sum(ids.numel() for ids in windows.values())
        save("quality", {"base_nll": base, "held_out_tokens": tokens, "rows": rows})


def held_out(ranked: Ranked) -> tuple[dict[str, torch.Tensor], float]:
    """Windows of four domains, and the loss of the model on them before anything is pruned."""
    tokenizer = load_tokenizer(ranked.source, ranked.model.config)
    windows = evaluation_windows("tiny", tokenizer, samples=48, seq_len=256)
    return windows, mean_nll(evaluate(ranked.model, windows))


def measure(
    ranked: Ranked,
    method: str,
    allocator: str,
    label: str,
    base: float,
    windows: dict[str, torch.Tensor],
) -> dict:
    """Loss increase at every share of one plan."""
    attach_plan(ranked, make_plan(ranked, allocator, bar))
    merged = budget_rows(ranked.model, windows, SHARES)
    increase = {f"{row['pruned']:g}": round(row["nll"] - base, 4) for row in merged}
    print(f"{method:10} {label:40}", increase, flush=True)
    return {"method": method, "allocate": label, "nll_increase": increase}


if __name__ == "__main__":
    main()
