"""PreMoe on the four domains of the shipped model: specialists, generalist, retrieval, bytes.

    python bench/premoe.py                   # writes results/premoe.json (ten minutes on a core)
    python bench/premoe.py loss retrieval    # these parts again, the others as they are there

Every pattern is profiled on the training text of its domain; losses and retrieval are measured on
held-out text. What a specialist takes to make and to load is also measured on a random model large
enough for it to show, in a fresh process for each job.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from common import RESULTS, random_model, save
from flexmoe.checkpoint import Checkpoint
from flexmoe.data import calibration_windows, evaluation_windows, load_tokenizer
from flexmoe.evaluation.intervals import share_interval
from flexmoe.evaluation.losses import loss_rows, window_losses
from flexmoe.family import load as load_model
from flexmoe.headers import resolve
from flexmoe.memory import MostHeld, held
from flexmoe.premoe import Pattern, Specialists, activate, compile_plan, load, profile, specialise
from flexmoe.premoe.retrieval import nearest
from flexmoe.premoe.signature import (
    mean_signature,
    measure_reach,
    prompt_lengths,
    router_logits,
    signatures,
)
from flexmoe.progress import bar

DOMAINS = ("books", "code", "math", "tech")
METHODS = ("peu", "tcess", "frequency", "reap", "easy-ep")
KEEP = 0.5
SAMPLES, HELD_OUT, SEQ_LEN = 128, 32, 256
WINDOWS, PROMPT = 48, 64  # evaluated windows of SEQ_LEN tokens a domain, each after a prompt
QUERIES = 128  # held-out windows a domain whose beginnings are queries
RANDOM_SEEDS = 3
SHAPE = (4, 64, 512, 1024, 8)  # layers, experts, channels, hidden, top-k of the random model
CPU = torch.device("cpu")


def main() -> None:
    if sys.argv[1:2] == ["job"]:
        print(json.dumps(JOBS[sys.argv[2]](Path(sys.argv[3]))))
        return
    logging.disable_progress_bar()
    wanted = sys.argv[1:] or list(PARTS)
    path = RESULTS / "premoe.json"
    before = json.loads(path.read_text()) if path.is_file() else {}
    kept = {name: before[name] for name in PARTS if name in before and name not in wanted}
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "patterns"
        profile_all(store, "peu")
        opened = load("tiny", keep=KEEP, store=store, dtype=torch.float32)
        result = {
            "keep": KEEP,
            "method": opened.patterns[0].recipe.method,
            "calibration_windows": SAMPLES,
            "seq_len": SEQ_LEN,
            "windows_a_domain": WINDOWS,
            "prompt": PROMPT,
        }
        for name in wanted:
            result[name] = PARTS[name](opened, store, Path(folder))
    if kept:
        where = before.get("earlier", before)["environment"]
        result["earlier"] = {"parts": list(kept), "environment": where}
    save("premoe", result | kept)


def profile_all(store: Path, method: str) -> None:
    """Patterns of all domains by one method."""
    for domain in DOMAINS:
        settings = {"samples": SAMPLES, "seq_len": SEQ_LEN, "method": method}
        profile("tiny", domain, f"{domain}.train", store=store, track=bar, **settings)


# --- Loss of every member on every domain ------------------------------------------------------


def losses(opened: Specialists) -> dict[str, dict]:
    """Increase over the full model on each domain, with 95 % intervals, and the mean of domains.

    ``retrieved`` answers each window with the member that the `PROMPT` tokens before it ask for.
    """
    model = opened.model
    tokenizer = load_tokenizer(resolve("tiny"), model.config)
    found = evaluation_windows("tiny", tokenizer, samples=WINDOWS, seq_len=PROMPT + SEQ_LEN)
    prompts = {name.removesuffix(".valid"): ids[:, :PROMPT] for name, ids in found.items()}
    members = specialists(opened) | {
        "generalist, scores over their sum": partial(
            active, model, [over_its_sum(pattern) for pattern in opened.patterns]
        )
    }
    for seed in range(RANDOM_SEEDS):
        members[f"random {seed}"] = partial(active, model, [at_random(opened.patterns[0], seed)])
    measured = window_losses(members, held_out(model), track=bar)
    chosen = {d: [opened.retrieve(ids).task or "full" for ids in prompts[d]] for d in prompts}
    measured["retrieved"] = {
        d: torch.stack([measured[task][d][n] for n, task in enumerate(tasks)])
        for d, tasks in chosen.items()
    }
    counts = {d: {t: tasks.count(t) for t in sorted(set(tasks))} for d, tasks in chosen.items()}
    return {"members": increases(measured), "retrieved_as": counts}


def held_out(model: PreTrainedModel) -> dict[str, Tensor]:
    """The evaluated windows of every domain: what follows each prompt."""
    tokenizer = load_tokenizer(resolve("tiny"), model.config)
    found = evaluation_windows("tiny", tokenizer, samples=WINDOWS, seq_len=PROMPT + SEQ_LEN)
    return {name.removesuffix(".valid"): ids[:, PROMPT:] for name, ids in found.items()}


def specialists(opened: Specialists) -> dict[str, Callable[[], PreTrainedModel]]:
    """The full model, each pattern's specialist and the generalist of all."""
    members = {p.task: partial(active, opened.model, [p]) for p in opened.patterns}
    generalist = partial(active, opened.model, opened.patterns)
    return {"full": partial(full, opened), **members, "generalist": generalist}


def full(opened: Specialists) -> PreTrainedModel:
    opened.activate(None)
    return opened.model


def active(model: PreTrainedModel, patterns: list[Pattern]) -> PreTrainedModel:
    activate(model, compile_plan(patterns, KEEP))
    return model


def increases(measured: dict[str, dict[str, Tensor]]) -> dict[str, dict]:
    """Loss, and its increase over the full model, of every member: each domain, and the mean."""
    keep = ("nll", "increase", "increase_interval")
    return {
        name: {
            "mean": {key: row[key] for key in keep},
            **{d: {key: part[key] for key in keep} for d, part in row["by_file"].items()},
        }
        for name, row in loss_rows(measured, "full").items()
    }


def other_scores(folder: Path) -> dict[str, dict[str, float]]:
    """By method: increase of each domain's own specialist, mean of the domains, and of the
    generalist."""
    found = {}
    for method in METHODS:
        profile_all(folder / method, method)
        opened = load("tiny", keep=KEEP, store=folder / method, dtype=torch.float32)
        rows = increases(window_losses(specialists(opened), held_out(opened.model), track=bar))
        own = [rows[domain][domain]["increase"] for domain in DOMAINS]
        found[method] = {
            "own": sum(own) / len(own),
            "generalist": rows["generalist"]["mean"]["increase"],
        }
        print(method, found[method], flush=True)
    return found


def over_its_sum(pattern: Pattern) -> Pattern:
    """A pattern whose scores add up to 1 in every layer, as EASY-EP mixes domains."""
    return replace(pattern, score={i: s / s.sum() for i, s in pattern.score.items()})


def at_random(pattern: Pattern, seed: int) -> Pattern:
    """A pattern whose scores are drawn."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {i: torch.rand(len(s), generator=generator) for i, s in pattern.score.items()}
    return replace(pattern, score=drawn)


# --- Retrieval on held-out prompts -------------------------------------------------------------


def retrieval(opened: Specialists) -> dict[str, dict]:
    """By signature and length of the prompt: how often the nearest pattern is the right one; how
    often a domain's text is within reach of the nearest; and how often the text of a domain is out
    of reach of the other three, so that a store without it would answer with the full model."""
    model = opened.model
    tokenizer = load_tokenizer(resolve("tiny"), model.config)
    found: dict[str, dict] = {}
    for name, signature in {"mean logits": signatures, "TCESS (v1)": tcess}.items():
        patterns = opened.patterns
        if signature is not signatures:
            patterns = [with_signature(model, tokenizer, p, signature) for p in patterns]
        found[name] = {
            str(tokens): count_hits(model, tokenizer, patterns, signature, tokens)
            for tokens in prompt_lengths(SEQ_LEN)
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


def tcess(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The key of the paper's first version [n, E]: a token counts with its largest logit."""
    logits_nTE = router_logits(model, ids).double()
    value, expert = logits_nTE.topk(1, -1)
    return torch.zeros_like(logits_nTE).scatter(-1, expert, value).mean(1)


def with_signature(model: PreTrainedModel, tokenizer, pattern: Pattern, signature) -> Pattern:
    """The pattern with another signature, from the same windows."""
    ids = calibration_windows(
        pattern.recipe.data, tokenizer, samples=SAMPLES + HELD_OUT, seq_len=SEQ_LEN, seed=0
    ).ids
    with patch("flexmoe.premoe.signature.signatures", signature):
        mean_E = mean_signature(model, ids[:SAMPLES], 8)
        reach, spread = measure_reach(model, ids[:SAMPLES], ids[SAMPLES:], mean_E, 8)
    return replace(pattern, signature_E=mean_E, reach=reach, spread=spread)


def count_hits(
    model: PreTrainedModel, tokenizer, patterns: list[Pattern], signature, tokens: int
) -> dict[str, dict]:
    """Right, within reach, and out of reach of the others, by domain and together."""
    windows = evaluation_windows("tiny", tokenizer, samples=QUERIES, seq_len=SEQ_LEN)
    by_domain, asked = {}, 0
    total = dict.fromkeys(("right", "known", "unknown without it"), 0)
    for name, ids in windows.items():
        domain = name.removesuffix(".valid")
        others = [pattern for pattern in patterns if pattern.task != domain]
        seen_nE = signature(model, ids[:, :tokens])
        with_all = [nearest(patterns, seen_E, tokens) for seen_E in seen_nE]
        without = [nearest(others, seen_E, tokens) for seen_E in seen_nE]
        hits = {
            "right": sum(match.nearest == domain for match in with_all),
            "known": sum(match.task is not None for match in with_all),
            "unknown without it": sum(match.task is None for match in without),
        }
        by_domain[domain] = shares(hits, len(ids))
        asked += len(ids)
        total = {key: total[key] + hits[key] for key in total}
    return {"all": shares(total, asked), **by_domain}


def shares(hits: dict[str, int], n: int) -> dict[str, object]:
    """Counts as shares of ``n`` with their 95 % intervals."""
    found: dict[str, object] = {"n": n}
    for name, number in hits.items():
        found[name] = number / n
        found[f"{name} interval"] = share_interval(number, n)
    return found


# --- Bytes and memory --------------------------------------------------------------------------


def bytes_read(store: Path, folder: Path) -> dict[str, dict[str, int]]:
    """Of the shipped model: bytes read to make each member, and bytes of what was written."""
    found = {"full": {"written": Checkpoint(resolve("tiny")).bytes}}
    for name, tasks in {**{d: [d] for d in DOMAINS}, "generalist": list(DOMAINS)}.items():
        done = specialise("tiny", tasks, folder / name, keep=KEEP, store=store)
        found[name] = {"read": done.read, "written": done.bytes}
    return found


def large() -> dict[str, dict]:
    """Memory that jobs take on a random model beyond what the program takes, each in a process of
    its own."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, dict] = {"shape": dict(zip(NAMES, SHAPE, strict=True))}
        for job in JOBS:
            command = [sys.executable, __file__, "job", job, folder]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            found[job] = json.loads(run.stdout.splitlines()[-1])
            print(job, found[job], flush=True)
    return found


def make(root: Path) -> dict[str, int]:
    """Write the random model with the shipped tokenizer, and profile one task on it."""
    random_model(*SHAPE).to(torch.bfloat16).save_pretrained(root / "base")
    for file in resolve("tiny").glob("tokenizer*"):
        (root / "base" / file.name).write_bytes(file.read_bytes())
    settings = {"samples": 8, "seq_len": 128, "store": root / "patterns"}
    profile(root / "base", "books", "books.train", **settings)
    return {"bytes": Checkpoint(root / "base").bytes}


def cut(root: Path) -> dict[str, int]:
    before = held(CPU)
    with MostHeld(CPU) as most:
        done = specialise(
            root / "base", ["books"], root / "half", keep=KEEP, store=root / "patterns"
        )
    return {"read": done.read, "written": done.bytes, "peak": most.bytes - before}


def open_at(name: str, root: Path) -> dict[str, int]:
    """Memory that the loaded model takes in float32, and the most on the way."""
    before = held(CPU)
    with MostHeld(CPU) as most:
        model = load_model(root / name, dtype=torch.float32)
    assert model is not None
    return {"held": held(CPU) - before, "peak": most.bytes - before}


NAMES = ("layers", "experts", "channels", "hidden", "top_k")
JOBS = {
    "make": make,
    "specialise": cut,
    "load the model": partial(open_at, "base"),
    "load the specialist": partial(open_at, "half"),
}
PARTS: dict[str, Callable[[Specialists, Path, Path], dict]] = {
    "loss": lambda opened, store, folder: losses(opened),
    "scores": lambda opened, store, folder: other_scores(folder),
    "retrieval": lambda opened, store, folder: retrieval(opened),
    "bytes": lambda opened, store, folder: bytes_read(store, folder),
    "large": lambda opened, store, folder: large(),
}

if __name__ == "__main__":
    main()
