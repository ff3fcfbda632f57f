"""Held-out loss of methods, allocators and settings of learning on the shipped model.

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
from flexmoe.data import evaluation_windows
from flexmoe.evaluate import budget_rows, evaluate, mean_nll
from flexmoe.family import attach
from flexmoe.learn import LearnConfig
from flexmoe.methods import all_methods
from flexmoe.pipeline import CompressConfig, Ranked, make_plan, rank_channels
from flexmoe.progress import bar
from flexmoe.report import merge_rows

SHARES = (0.2, 0.4, 0.6, 0.8)
SCORED = ("uniform", "layer", "global")
LEARNED = {
    "paper's form, 150 steps": {},
    "300 steps": {"steps": 300},
    "load floor 0.3": {"load_floor": 0.3},
    "lr 0.2": {"lr": 0.2},
    "lr 0.05": {"lr": 0.05},
    "margin 1.5": {"margin": 1.5},
    "no entropy term": {"beta": (0.0, 0.0)},
    "17 actions": {"actions": tuple(i / 16 for i in range(17)), "margin": 5.0},
}
CONFIG = CompressConfig(data="tiny", samples=128, seq_len=256, pruned=SHARES)


def main() -> None:
    logging.disable_progress_bar()
    only = sys.argv[1:]
    rows, base = [], 0.0
    for name in [n for n in sorted(all_methods()) if not only or n in only]:
        data = CONFIG.data if all_methods()[name].needs else None
        ranked = rank_channels("tiny", dataclasses.replace(CONFIG, method=name, data=data), bar)
        windows = held_out(ranked)
        base = mean_nll(evaluate(ranked.model, windows))
        for allocator in SCORED:
            rows.append(measure(ranked, name, allocator, allocator, base, windows))
    if not only or "learned" in only:
        config = dataclasses.replace(CONFIG, samples=512, allocate="learned")
        for name, settings in LEARNED.items():
            learn = dataclasses.replace(LearnConfig(), **settings)
            config = dataclasses.replace(config, learn=learn)
            ranked = rank_channels("tiny", config, bar)
            windows = held_out(ranked)
            base = mean_nll(evaluate(ranked.model, windows))
            rows.append(measure(ranked, "fisher", "learned", f"learned: {name}", base, windows))
    if not only:
        tokens = sum(ids.numel() for ids in windows.values())
        save("quality", {"base_nll": base, "held_out_tokens": tokens, "rows": rows})


def held_out(ranked: Ranked) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(ranked.source)
    return evaluation_windows("tiny", tokenizer, samples=48, seq_len=256)


def measure(
    ranked: Ranked,
    method: str,
    allocator: str,
    label: str,
    base: float,
    windows: dict[str, torch.Tensor],
) -> dict:
    """Loss increase at every share of one plan."""
    attach(ranked.model, make_plan(ranked, allocator, bar), ranked=True)
    merged = merge_rows(budget_rows(ranked.model, windows, SHARES))
    increase = {f"{row['pruned']:g}": round(row["nll"] - base, 4) for row in merged}
    print(f"{method:10} {label:40}", increase, flush=True)
    return {"method": method, "allocate": label, "nll_increase": increase}


if __name__ == "__main__":
    main()
