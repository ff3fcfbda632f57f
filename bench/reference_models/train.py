"""Train a reference model from text.

    python bench/reference_models/train.py olmoe --work DIR [--corpus DIR] [--tokens N]

The model comes to DIR/NAME with its tokenizer and ``recipe.json``. The same command goes on after
a break: the state is kept in DIR/NAME.checkpoint.pt every few minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import datetime
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data import TOKENIZER, draw, training_tokens
from recipes import RECIPES, Recipe
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, OlmoeForCausalLM
from transformers.utils import logging
from upcycle import upcycle

from flexmoe.data import TINY, evaluation_windows
from flexmoe.evaluation.evaluate import evaluate
from flexmoe.files import written_beside

sys.path.append(str(Path(__file__).parents[1]))
from common import environment

REPORT_STEPS = 25
HELD_OUT = "*.valid.jsonl.gz"


class Training:
    """Model, optimizer and where the training stands: all that a checkpoint keeps."""

    def __init__(self, recipe: Recipe, tokens: int, device: str) -> None:
        self.recipe, self.device = recipe, device
        self.steps = max(1, tokens // (recipe.window * recipe.windows_per_step))
        share = recipe.dense_share if recipe.dense_channels else 0
        self.dense_steps = round(self.steps * share)
        self.step, self.seconds = 0, 0.0
        self.notes: dict[str, float] = {}
        torch.manual_seed(recipe.seed)
        self._use(OlmoeForCausalLM(recipe.config(self.stage)))

    @property
    def stage(self) -> str:
        return "dense" if self.step < self.dense_steps else "moe"

    def _use(self, model: OlmoeForCausalLM) -> None:
        self.model = model.to(self.device).train()
        model.set_experts_implementation("grouped_mm")
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": self.recipe.weight_decay}, {"params": others}],
            lr=self.recipe.lr,
            betas=self.recipe.betas,
            weight_decay=0.0,
            fused=True,
        )

    def rate(self) -> float:
        """Learning rate of this step. Each stage warms up, for its optimizer is new."""
        recipe = self.recipe
        into = self.step - (self.dense_steps if self.stage == "moe" else 0)
        decay = (self.steps - self.step) / max(1, recipe.decay * self.steps)
        return recipe.lr * min(1.0, (into + 1) / recipe.warm_up) * min(1.0, decay)

    def advance(self, ids: Tensor) -> float:
        """One step on windows ``ids``; the language model's loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        kind = torch.device(self.device).type
        with torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu" or cpu_has_bfloat16()):
            out = self.model(input_ids=ids, labels=ids, output_router_logits=True, use_cache=False)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return float(out.loss.detach() - self.recipe.aux_loss * out.aux_loss.detach())

    def to_mixture(self, ids: Tensor) -> None:
        """The second stage: `upcycle`, at the first step of stage ``moe``. The loss on ``ids``
        before and after tells what the cut has cost."""
        self.notes["loss_dense"] = self._loss(ids)
        self._use(upcycle(self.model, self.recipe.config(), ids, self.recipe.seed))
        self.notes["loss_upcycled"] = self._loss(ids)
        print("upcycled:", self.notes, flush=True)

    @torch.no_grad()
    def _loss(self, ids: Tensor) -> float:
        return float(self.model(input_ids=ids, labels=ids).loss)

    def save(self, path: Path) -> None:
        """Beside, then rename: a killed process leaves the last whole state."""
        state = {
            "recipe": dataclasses.asdict(self.recipe),
            "steps": self.steps,
            "step": self.step,
            "experts": self.model.config.num_experts,
            "seconds": self.seconds,
            "notes": self.notes,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        beside = path.with_suffix(".partial")
        with beside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)

    def restore(self, path: Path) -> None:
        state = torch.load(path, map_location=self.device, weights_only=True)
        here = (dataclasses.asdict(self.recipe), self.steps)
        if here != (state["recipe"], state["steps"]):
            raise SystemExit(f"{path} is of other settings: remove it, or give another --name")
        self.step, self.seconds = state["step"], state["seconds"]
        self.notes = state["notes"]
        dense = state["experts"] == 1 and self.recipe.experts != 1
        self._use(OlmoeForCausalLM(self.recipe.config("dense" if dense else "moe")))
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])


def cpu_has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself: where it does not, that is seven times slower
    than float32."""
    can = torch.cpu.get_capabilities()
    return any(can.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def train(training: Training, streams: dict[str, np.ndarray], path: Path, every: float) -> None:
    """Go from where ``training`` stands to its end, with a checkpoint ``every`` so many seconds."""
    recipe = training.recipe
    began = saved = time.perf_counter()
    first, before = training.step, training.seconds
    losses: list[float] = []
    while training.step < training.steps:
        ids = draw(
            streams,
            recipe.windows_per_step,
            recipe.window,
            recipe.domain_power,
            recipe.seed,
            training.step,
        ).to(training.device)
        if training.stage == "moe" and training.model.config.num_experts != recipe.experts:
            training.to_mixture(ids)
        losses.append(training.advance(ids))
        now = time.perf_counter()
        training.seconds = before + now - began
        if training.step % REPORT_STEPS == 0 or training.step == training.steps:
            per_step = (now - began) / (training.step - first)
            rest = datetime.timedelta(seconds=round((training.steps - training.step) * per_step))
            print(
                f"{path.name.split('.')[0]} {training.step}/{training.steps} "
                f"loss {sum(losses) / len(losses):.4f} lr {training.rate():.1e} "
                f"{ids.numel() / per_step:,.0f} tokens/s, {rest} left",
                flush=True,
            )
            losses = []
        if now - saved > every:
            training.save(path)
            saved = time.perf_counter()


def held_out(folder: Path, corpus: Path, device: str) -> dict[str, float]:
    """Loss per domain (nats per token) of the saved model, computed in float32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    files = ",".join(str(file) for file in sorted(corpus.glob(HELD_OUT)))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = evaluation_windows(files, tokenizer, samples=None, seq_len=256)
    rows = evaluate(model, windows)
    return {name.removesuffix(".valid"): round(row["nll"], 4) for name, row in rows.items()}


def finish(training: Training, name: str, corpus: Path, out: Path) -> dict[str, Any]:
    """Write the model in bfloat16, its tokenizer and ``recipe.json``."""
    recipe, model = training.recipe, training.model.to(torch.bfloat16)
    tokens = training.steps * recipe.window * recipe.windows_per_step
    with written_beside(out) as folder:
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
        record = {
            "name": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "tokens": tokens,
            "seconds": round(training.seconds),
            "tokens_per_second": round(tokens / max(1e-9, training.seconds)),
            "held_out_loss": held_out(folder, corpus, training.device),
            **training.notes,
            "recipe": {**dataclasses.asdict(recipe), "tokens": tokens},
            "environment": environment(),
        }
        (folder / "recipe.json").write_text(json.dumps(record, indent=1) + "\n")
    return record


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed: every step asks for the same large blocks again, and to
    get them fresh from the system costs a quarter of the time on a CPU."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", choices=RECIPES)
    parser.add_argument("--work", type=Path, required=True, help="folder for models and tokens")
    parser.add_argument("--corpus", type=Path, default=TINY, help="folder of *.train.jsonl.gz")
    parser.add_argument("--tokens", type=int, help="default: the recipe's")
    parser.add_argument("--name", help="of the model, default: the recipe's")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--threads", type=int, help="default: torch's choice")
    parser.add_argument("--save-every", type=float, default=180, help="seconds")
    args = parser.parse_args()

    logging.disable_progress_bar()
    keep_freed_memory()
    if args.threads:
        torch.set_num_threads(args.threads)
    name = args.name or args.recipe
    out, path = args.work / name, args.work / f"{name}.checkpoint.pt"
    if out.exists():
        raise SystemExit(f"{out} is there already")
    if not any(args.corpus.glob(HELD_OUT)):
        raise SystemExit(f"no file {HELD_OUT} in {args.corpus}")
    args.work.mkdir(parents=True, exist_ok=True)
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    streams = training_tokens(args.corpus, AutoTokenizer.from_pretrained(TOKENIZER), args.work)
    recipe = RECIPES[args.recipe]
    training = Training(recipe, args.tokens or recipe.tokens, device)
    if path.exists():
        training.restore(path)
        print(f"going on from step {training.step}", flush=True)
    train(training, streams, path, args.save_every)
    training.save(path)  # all steps are done: only the evaluation is left to lose
    record = finish(training, name, args.corpus, out)
    path.unlink(missing_ok=True)
    print(json.dumps(record["held_out_loss"]), flush=True)


if __name__ == "__main__":
    main()
