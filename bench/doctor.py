"""What doctor says a job will need against what it then needs: peak memory, disk, time.

    python bench/doctor.py             # writes results/doctor.json

Three random models of 230 to 290 MB in float32 (many small experts; few large ones and a large
vocabulary; fused, transposed experts with biases). Each job runs in a process of its own, which
imports everything and examines the model first; the peak is that of its resident memory beyond
what it has then, as the system counts it.
"""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from common import save

COMMON: dict[str, Any] = dict(
    hidden_size=512, num_attention_heads=8, num_key_value_heads=2, max_position_embeddings=2048
)
MODELS = ("qwen3_moe", "mixtral", "gpt_oss")
JOBS = ("global", "full", "closed-form", "uniform", "ragged", "masked", "learned")
# one source, or batches would be smaller: they do not mix sources
SMALL: dict[str, Any] = dict(data="books.train", seq_len=256, batch_size=4)
TOKENS = 3072  # three steps: the optimizer's state is there from the second on
PRUNED = 0.4


def make(name: str, folder: Path) -> None:
    """One of the models on disk, with the tokenizer of the shipped one."""
    from flexmoe.data import TINY

    torch.manual_seed(0)
    if name == "qwen3_moe":
        config = Qwen3MoeConfig(
            vocab_size=4096, intermediate_size=512, moe_intermediate_size=256, head_dim=64,
            num_hidden_layers=4, num_experts=32, num_experts_per_tok=4, **COMMON,
        )  # fmt: skip
        Qwen3MoeForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="30MB")
    elif name == "mixtral":
        few = MixtralConfig(
            vocab_size=32000, intermediate_size=1024, num_hidden_layers=3, num_local_experts=8,
            num_experts_per_tok=2, **COMMON,
        )  # fmt: skip
        MixtralForCausalLM(few).save_pretrained(folder)
    else:
        fused = GptOssConfig(
            vocab_size=16000, intermediate_size=512, num_hidden_layers=4, head_dim=64,
            num_local_experts=16, num_experts_per_tok=4,
            rope_parameters={"rope_type": "default", "rope_theta": 1e4}, **COMMON,
        )  # fmt: skip
        GptOssForCausalLM(fused).bfloat16().save_pretrained(folder, max_shard_size="60MB")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "model" / file, folder / file)


def worker(job: str, root: Path) -> None:
    """One job: what is expected and what was needed, as one line of JSON."""
    from flexmoe.checkpoint import Checkpoint
    from flexmoe.doctor.diagnosis import examine
    from flexmoe.doctor.estimates import Estimator
    from flexmoe.exporter import export
    from flexmoe.learn import LearnConfig
    from flexmoe.memory import give_back
    from flexmoe.pipeline import CompressConfig, compress
    from flexmoe.recover import recover
    from flexmoe.recover_config import RecoverConfig

    torch.set_num_threads(1)
    base, family, out = root / "base", root / "family", root / job
    learn = LearnConfig(steps=1) if job == "learned" else None
    settings = CompressConfig(samples=4, allocate=job, learn=learn, **SMALL)
    improve = RecoverConfig(mode=job, tokens=TOKENS, **SMALL)
    first = job in ("global", "learned")
    if first:
        (need,) = examine(base, settings, everything=False).needs
    elif job in ("full", "closed-form"):
        found = Estimator.open(family)
        need = found.recover(improve, 2**34)
    else:
        found = examine(family)
        need = next(need for need in found.needs if need.job.endswith(job))
    gc.collect()
    give_back()  # what is free but kept would be counted as held before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before, start = resident("VmRSS"), time.perf_counter()
    if first:
        compress(base, out, settings)
    elif job in ("full", "closed-form"):
        recover(family, out, improve)
    else:
        export(family, out, pruned=PRUNED, layout=job)
    result = {
        "memory": {"expected": need.memory, "measured": resident("VmHWM") - before},
        "disk": {"expected": need.disk, "measured": Checkpoint(out).bytes},
        "seconds": {"expected": need.seconds, "measured": time.perf_counter() - start},
        "parts": need.parts,
    }
    if job == "global":
        out.rename(family)
    print(json.dumps(result))


def resident(name: str) -> int:
    """Bytes of memory of this process, from /proc."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    if len(sys.argv) > 2:
        worker(sys.argv[1], Path(sys.argv[2]))
        return
    models: dict[str, Any] = {name: {} for name in MODELS}
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            make(name, Path(folder) / name / "base")
        for job in JOBS:
            for name in MODELS:
                command = [sys.executable, __file__, job, f"{folder}/{name}"]
                run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                row = models[name][job] = json.loads(run.stdout.splitlines()[-1])
                row["memory"]["off"] = row["memory"]["expected"] / row["memory"]["measured"] - 1
                print(name, job, {k: v for k, v in row.items() if k != "parts"}, flush=True)
                summarize(models)  # of what there is so far


def summarize(models: dict[str, Any]) -> None:
    """Write the rows and how far off the furthest is."""
    of_all = [row["memory"]["off"] for rows in models.values() for row in rows.values()]
    worst = max(of_all, key=abs)
    same = all(
        row["disk"]["expected"] == row["disk"]["measured"]
        for rows in models.values()
        for row in rows.values()
    )
    print(f"memory off by {min(of_all):+.0%} to {max(of_all):+.0%}; disk exact: {same}")
    settings = {**SMALL, "samples": 4, "learn_steps": 1, "tokens": TOKENS, "pruned": PRUNED}
    save("doctor", {"settings": settings, "models": models, "worst": worst, "disk_exact": same})


if __name__ == "__main__":
    main()
