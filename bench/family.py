"""Which recipe keeps the most quality at every budget: plans alone, and recovered families.

    python bench/family.py plans MODEL --seed 0      # about 10 minutes on one core for `tiny`
    python bench/family.py recovery MODEL --seed 0
    python bench/family.py pairs MODEL --pairs blimp.jsonl.gz

MODEL is ``tiny`` or a folder (see reference_models/). Every recipe gets the same calibration
windows and is evaluated on the same held-out windows in one process, the base beside it. Each
recipe is kept in results/family.json as soon as it is measured, and one that is there already for
the same model and seed is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import fcntl
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from common import RESULTS, environment
from flexmoe.actions import ActionConfig
from flexmoe.data import calibration_windows, evaluation_windows, load_tokenizer
from flexmoe.distil import Schedule, Swapped, distil
from flexmoe.evaluation.evaluate import budget_rows, evaluate, mean_nll
from flexmoe.evaluation.members import budgets_of
from flexmoe.evaluation.pairs import encode, pair_rows, read_pairs, right_pairs
from flexmoe.experts import expert_layers, experts_function
from flexmoe.headers import resolve
from flexmoe.learn import LearnConfig
from flexmoe.lora import lora_experts
from flexmoe.pipeline import CompressConfig, Ranked, attach_plan, make_plan, rank_channels
from flexmoe.plan import Plan
from flexmoe.progress import bar
from flexmoe.rco import RcoConfig, Units, learn_mask
from flexmoe.recover import trained_parameters
from flexmoe.recover_config import RANK, default_rate
from flexmoe.refit import refit
from rivals import progressive

SHARES = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SAMPLES, SEQ_LEN, HELD_OUT, RCO_STEPS = 256, 256, 24, 40
PATH = RESULTS / "family.json"


class Bench:
    """One model and seed: its calibration windows, held-out windows and results so far."""

    def __init__(self, model: str, seed: int, path: Path = PATH, only: Sequence[str] = ()):
        self.model, self.seed, self.path, self.only = model, seed, path, only
        self.name = "tiny" if model == "tiny" else Path(model).name
        self.windows: dict[str, Tensor] = {}
        self.base = 0.0

    def rank(self, method: str = "fisher", **changes: Any) -> Ranked:
        config = CompressConfig(
            data="tiny",
            samples=SAMPLES,
            seq_len=SEQ_LEN,
            pruned=SHARES,
            method=method,
            seed=self.seed,
            batch_size=8,
        )
        ranked = rank_channels(self.model, dataclasses.replace(config, **changes), bar)
        if not self.windows:
            tokenizer = load_tokenizer(resolve(self.model), ranked.model.config)
            self.windows = evaluation_windows("tiny", tokenizer, samples=HELD_OUT, seq_len=SEQ_LEN)
            self.base = mean_nll(evaluate(ranked.model, self.windows))
        return ranked

    def skips(self, recipe: str) -> bool:
        """Whether there is nothing to do: measured already, or not asked for."""
        measured = any(self._is(row, recipe) for row in self._rows())
        return measured or not any(words in recipe for words in self.only or [""])

    def _is(self, row: Mapping[str, Any], recipe: str) -> bool:
        return (row["model"], row["seed"], row["recipe"]) == (self.name, self.seed, recipe)

    def keep(self, recipe: str, nll: Mapping[float, float], seconds: float, **more: Any) -> None:
        """Add a recipe's losses, by pruned share, to the results."""
        increase = {f"{share:g}": round(value - self.base, 5) for share, value in nll.items()}
        where = environment()
        row = {
            "model": self.name,
            "seed": self.seed,
            "recipe": recipe,
            "base_nll": round(self.base, 5),
            "nll_increase": increase,
            "seconds": round(seconds, 1),
            "date": where["date"],
            "commit": where["commit"],
            "cpu": where["cpu"],
            **more,
        }
        settings = {
            "calibration_windows": SAMPLES,
            "seq_len": SEQ_LEN,
            "held_out_windows_a_domain": HELD_OUT,
        }
        with self.path.with_suffix(".lock").open("w") as lock:  # two models may be measured at once
            fcntl.flock(lock, fcntl.LOCK_EX)
            rows = [other for other in self._rows() if not self._is(other, recipe)] + [row]
            rows.sort(key=lambda r: (r["model"], r["recipe"], r["seed"]))
            text = json.dumps({"environment": where, **settings, "rows": rows}, indent=1)
            self.path.write_text(text + "\n")
        print(f"{self.name} seed {self.seed} {recipe:44} {seconds:5.0f} s", increase, flush=True)

    def _rows(self) -> list[dict[str, Any]]:
        return json.loads(self.path.read_text())["rows"] if self.path.is_file() else []

    def losses(self, ranked: Ranked, plan: Plan, shares: tuple[float, ...]) -> dict[float, float]:
        if ranked.model.__dict__.get("flexmoe_plan") is not plan:
            attach_plan(ranked, plan)
        rows = budget_rows(ranked.model, self.windows, shares)
        return {row["pruned"]: row["nll"] for row in rows}


def learned_plan(bench: Bench) -> tuple[Ranked, Plan, float]:
    ranked = bench.rank(allocate="learned")
    start = time.monotonic()
    plan = make_plan(ranked, "learned", bar)
    return ranked, plan, time.monotonic() - start


def plans(bench: Bench) -> None:
    """Loss of every recipe that leaves the weights alone."""
    if not bench.skips("learned"):
        ranked, plan, seconds = learned_plan(bench)
        drawn = LearnConfig()
        tokens = drawn.steps * 8 * SEQ_LEN
        bench.keep(
            "learned",
            bench.losses(ranked, plan, SHARES),
            seconds,
            forwarded=tokens * (1 + drawn.draws),
            backwarded=tokens * drawn.draws,
        )
    scored: list[tuple[str, str, str]] = [
        ("global fisher", "fisher", "global"),
        ("global heapr", "heapr", "global"),
        ("camera per layer", "camera", "layer"),
        ("uniform fisher", "fisher", "uniform"),
    ]
    for recipe, method, allocator in scored:
        if not bench.skips(recipe):
            start = time.monotonic()
            ranked = bench.rank(method, allocate=allocator)
            plan = make_plan(ranked, allocator)
            bench.keep(recipe, bench.losses(ranked, plan, SHARES), time.monotonic() - start)
    if not bench.skips("paper: taylor, four actions"):
        ranked = bench.rank("taylor", allocate="actions")
        start = time.monotonic()
        plan = make_plan(ranked, "actions", bar)
        tokens = ActionConfig().steps * 8 * SEQ_LEN
        seconds = time.monotonic() - start
        bench.keep(
            "paper: taylor, four actions",
            bench.losses(ranked, plan, SHARES),
            seconds,
            forwarded=2 * tokens,
            backwarded=tokens,
        )
    if not bench.skips("progressive fisher"):
        ranked = bench.rank(allocate="global")
        start = time.monotonic()
        ranked.score = progressive(ranked)
        seconds = time.monotonic() - start
        plan = make_plan(ranked, "global")
        bench.keep("progressive fisher", bench.losses(ranked, plan, SHARES), seconds)
    if not bench.skips("rco, a run per budget"):
        ranked = bench.rank(allocate="global")
        start = time.monotonic()
        masks = {share: rco_mask(ranked, share, bench.seed) for share in SHARES}
        seconds = time.monotonic() - start
        nll = {}
        for share, mask in masks.items():
            for layer in expert_layers(ranked.model):
                layer.module.flexmoe_mask_EI = mask[layer.index]
            with experts_function(ranked.model, "flexmoe_mask"):
                nll[share] = mean_nll(evaluate(ranked.model, bench.windows))
        bench.keep("rco, a run per budget", nll, seconds)


def rco_mask(ranked: Ranked, share: float, seed: int) -> dict[int, Tensor]:
    """Masks [E, I] of one budget, learned from the ranks of the scores for that budget alone."""
    assert ranked.windows is not None
    units = Units(expert_layers(ranked.model), ranked.score)
    config = RcoConfig(steps=RCO_STEPS, draws=2, windows=8)
    first_X = config.spread * (0.5 - units.prior(ranked.score))
    none_X = torch.zeros(len(first_X))
    logit_X = learn_mask(
        ranked.model, ranked.windows.ids, units, first_X, none_X.bool(), share, config, seed
    )
    return units.by_layer(1.0 - units.hardest(logit_X, share).float())


def recovery(bench: Bench, tokens: int) -> None:
    """Loss of every budget after recovery, on the learned plan and (the paper's) on its own."""
    shares = (0.0, *SHARES)
    plans: dict[str, Callable[[], tuple[Ranked, Plan]]] = {
        "learned plan": lambda: learned_plan(bench)[:2],
        "its own plan": lambda: paper_plan(bench),
    }
    runs: list[tuple[str, str | None, str]] = [
        ("nothing, learned plan", None, ""),
        ("closed form, learned plan", "closed-form", ""),
        ("family, learned plan", "full", "family"),
        ("sp at 40, learned plan", "full", "sp"),
        ("paper: sp at 40, its own plan", "lora", "sp"),
        ("cp, learned plan", "full", "cp"),
    ]
    ready: dict[str, tuple[Ranked, Plan]] = {}
    for recipe, mode, scheme in runs:
        label, kind = f"recovered: {recipe}", recipe.rpartition(", ")[2]
        if bench.skips(label):
            continue
        if kind not in ready:
            ready[kind] = plans[kind]()
        ranked, plan = ready[kind]
        attach_plan(ranked, plan)
        begin = {name: p.detach().clone() for name, p in ranked.model.named_parameters()}
        start, more = time.monotonic(), {}
        if mode == "closed-form":
            refit(ranked.model, plan, ranked.windows.ids, batch_size=8)
        elif mode is not None:
            more = distilled(bench, ranked, plan, mode, scheme, tokens)
        seconds = time.monotonic() - start
        bench.keep(label, bench.losses(ranked, plan, shares), seconds, **more)
        put_back(ranked, begin)


def distilled(
    bench: Bench, ranked: Ranked, plan: Plan, mode: str, scheme: str, tokens: int, at: float = 0.4
) -> dict[str, Any]:
    """Recover the model in memory with so many tokens; returns what the row says of it."""
    steps = tokens // (8 * SEQ_LEN)
    ids = calibration_windows(
        "tiny", ranked.tokenizer, samples=steps * 8, seq_len=SEQ_LEN, seed=9, fewer=True
    ).ids
    rate = default_rate(mode, ranked.model.config.hidden_size)
    train(ranked, plan, mode, scheme, ids, Schedule(steps, 8, 8, rate, bench.seed), at)
    return {"tokens": steps * 8 * SEQ_LEN, "lr": rate, "mode": mode}


def paper_plan(bench: Bench) -> tuple[Ranked, Plan]:
    ranked = bench.rank("taylor", allocate="actions")
    return ranked, make_plan(ranked, "actions", bar)


def put_back(ranked: Ranked, begin: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in ranked.model.named_parameters():
            parameter.copy_(begin[name])


def train(
    ranked: Ranked,
    plan: Plan,
    mode: str,
    scheme: str,
    ids: Tensor,
    schedule: Schedule,
    at: float = 0.4,
) -> None:
    """`distil` as `flexmoe recover` calls it, on the model in memory."""
    model, how = ranked.model, {"scheme": scheme, "at": at, "track": bar}
    if mode == "lora":
        with lora_experts(model, rank=RANK, seed=schedule.seed) as adapter:
            if scheme == "sp":
                adapter.only_first(plan.widths(at))
            distil(model, adapter.parameters, adapter.off, ids, schedule, **how)
    else:
        parameters = list(trained_parameters(model, mode).values())
        swapped = Swapped(parameters)
        distil(model, parameters, swapped.original, ids, schedule, **how)


def pairs(bench: Bench, file: Path, per_paradigm: int | None, tokens: int) -> None:
    """BLiMP accuracy of the learned plan, alone and recovered, against the unpruned model."""
    ranked, plan, _ = learned_plan(bench)
    attach_plan(ranked, plan)
    found = read_pairs(file, per_paradigm)
    encoded = encode(found, ranked.tokenizer, ranked.model.config)
    shares = (0.0, 0.2, 0.4, 0.5, 0.6, 0.8)

    right = right_pairs(budgets_of(ranked.model, shares), encoded, track=bar)
    rows = {"plan alone": pair_rows(found, right)}
    if tokens:
        distilled(bench, ranked, plan, "full", "family", tokens)
        again = right_pairs(budgets_of(ranked.model, shares[1:]), encoded, track=bar)
        rows["recovered"] = pair_rows(found, {0.0: right[0.0], **again})
    path = RESULTS / f"pairs-{bench.name}.json"
    about = {"model": bench.name, "pairs": len(found), "recovery_tokens": tokens}
    result = {"environment": environment(), **about, "rows": rows}
    path.write_text(json.dumps(result, indent=1) + "\n")
    for name, by_share in rows.items():
        for share, row in by_share.items():
            print(name, share, row["accuracy"], row.get("ratio"), row.get("ratio_interval"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("plans", "recovery", "pairs"))
    parser.add_argument("model", help="'tiny' or a folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=400_000, help="to recover with, or 0")
    parser.add_argument("--only", nargs="+", default=(), help="recipes with one of these in them")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--per-paradigm", type=int, default=None)
    asked = parser.parse_args()
    logging.disable_progress_bar()
    bench = Bench(asked.model, asked.seed, only=asked.only)
    if asked.what == "plans":
        plans(bench)
    elif asked.what == "recovery":
        recovery(bench, asked.tokens)
    else:
        if asked.pairs is None:
            parser.error("pairs needs --pairs FILE")
        pairs(bench, asked.pairs, asked.per_paradigm, asked.tokens)


if __name__ == "__main__":
    main()
