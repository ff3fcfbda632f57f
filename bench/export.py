"""Peak memory and time of an export against the size of the checkpoint, a shard and a layer.

    python bench/export.py             # writes results/export.json

A random Qwen3-MoE of 1.2 GB (bf16) is ranked and exported in processes of their own, while a
thread reads the process's memory. Anonymous memory is what the export allocates; pages of mapped
checkpoint files are counted apart: the system takes those back whenever it needs them.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

from common import random_model, save

SHAPE = (6, 64, 512, 1024, 8)  # layers, experts, channels, hidden, top-k
SHARD = "200MB"
JOBS = ("rank", "uniform", "ragged", "masked")


def worker(job: str, root: Path) -> None:
    """One job; prints its seconds and peaks beyond what importing took."""
    from flexmoe.exporter import export, rank_checkpoint
    from flexmoe.plan import Plan

    plan = Plan.load(root / "plan")
    before, peak, stop = memory(), {"anonymous": 0, "mapped": 0}, threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            for key, value in memory().items():
                peak[key] = max(peak[key], value)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    if job == "rank":
        (root / "family").mkdir()
        rank_checkpoint(root / "base", plan, root / "family")
        plan.save(root / "family", ranked=True)
    else:
        export(root / "family", root / job, pruned=0.4, layout=job)
    seconds = time.perf_counter() - start
    stop.set()
    thread.join()
    print(json.dumps({"seconds": seconds, **{k: v - before[k] for k, v in peak.items()}}))


def memory() -> dict[str, int]:
    """Bytes of anonymous and of file-mapped memory of this process."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    read = {"anonymous": "RssAnon", "mapped": "RssFile"}
    return {key: 1024 * int(fields[name].split()[0]) for key, name in read.items()}


def prepare(root: Path) -> dict[str, int]:
    """Write the checkpoint and a plan; the sizes that count."""
    from flexmoe.allocate import allocate, order_of
    from flexmoe.checkpoint import Checkpoint
    from flexmoe.experts import expert_layers
    from flexmoe.plan import LayerRecord, Plan, Recipe

    model = random_model(*SHAPE).to(torch.bfloat16)
    model.save_pretrained(root / "base", max_shard_size=SHARD)
    checkpoint = Checkpoint(root / "base")
    layers = {layer.index: layer.shape for layer in expert_layers(model)}
    generator = torch.Generator().manual_seed(0)
    score = {i: torch.rand(s.experts, s.channels, generator=generator) for i, s in layers.items()}
    budgets = (0.0, 0.2, 0.4, 0.6)
    recipe = Recipe(
        base_model="random", model_type="qwen3_moe", method="random", allocate="global", data="",
        data_sha256="", samples=0, seq_len=0, seed=0,
    )  # fmt: skip
    Plan(
        layers={i: LayerRecord(**vars(s), experts_per_token=SHAPE[-1]) for i, s in layers.items()},
        order={i: order_of(s) for i, s in score.items()},
        width=allocate("global", layers, score, budgets, 32),
        budgets=budgets,
        quantum=32,
        recipe=recipe,
        bytes_full=checkpoint.bytes,
        bytes_per_parameter=2,
    ).save(root / "plan")
    shards = [(root / "base" / file).stat().st_size for file in checkpoint.files]
    return {
        "checkpoint_bytes": checkpoint.bytes,
        "largest_shard_bytes": max(shards),
        "layer_bytes": 2 * next(iter(layers.values())).parameters,
    }


def main() -> None:
    if len(sys.argv) > 1:
        worker(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as folder:
        result: dict = prepare(Path(folder))
        result["jobs"] = {}
        for job in JOBS:
            command = [sys.executable, __file__, job, folder]
            run = subprocess.run(command, capture_output=True, text=True, check=True)
            result["jobs"][job] = json.loads(run.stdout.splitlines()[-1])
            print(job, result["jobs"][job], flush=True)
    print(result)
    save("export", result)


if __name__ == "__main__":
    main()
