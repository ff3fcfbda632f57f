"""A checkpoint more than four times larger than the memory allowed, from compress to exports.

    python bench/streaming.py             # writes results/streaming.json

A random Qwen3-MoE is written shard by shard, then compressed and recovered with --memory and
exported in all layouts by the command line, each command in a process of its own. Its peak is the
largest resident set that the system saw, libraries and all. The same compression with the whole
model in memory comes last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from common import save
from flexmoe.checkpoint import Checkpoint
from flexmoe.data import TINY
from flexmoe.headers import INDEX_NAME
from flexmoe.memory import gib
from flexmoe.plan import Plan
from flexmoe.reports.report import parse_bytes

SIZES = {  # layers, experts, channels, hidden, and the memory allowed
    "large": (140, 8, 512, 768, "728MiB"),
    "small": (6, 8, 128, 256, "704MiB"),  # to try this script
}
CLOSED_FORM = ["--tokens", "64", "--seq-len", "32", "--batch-size", "2"]
LAYOUTS = ("uniform", "ragged", "masked")
CALIBRATION = ["--samples", "2", "--seq-len", "32", "--batch-size", "2", "--allocate", "global"]


def write_checkpoint(path: Path, layers: int, experts: int, channels: int, hidden: int) -> None:
    """A random checkpoint in bf16 with hub names, one shard a layer, and a tokenizer."""
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=hidden, intermediate_size=channels,
        moe_intermediate_size=channels, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=2, head_dim=hidden // 8, num_experts=experts, num_experts_per_tok=4,
        max_position_embeddings=2048, dtype="bfloat16", norm_topk_prob=True,
    )  # fmt: skip
    shutil.copytree(TINY / "model", path, ignore=shutil.ignore_patterns("*.safetensors"))
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(path)
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in Qwen3MoeForCausalLM(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(
        max(map(math.prod, shapes.values())) + 1024 * len(shapes), generator=generator
    )
    weight_map, start = {}, 0
    for part in [
        "model.embed",
        "model.norm",
        "lm_head",
        *(f"model.layers.{i}." for i in range(layers)),
    ]:
        tensors = {}
        for name, shape in shapes.items():
            if name.startswith(part):
                start += 1024  # other numbers for every tensor, of few drawn
                value = noise[start : start + math.prod(shape)].view(shape) * 0.02
                tensors |= _hub(
                    name, (value + 1 if name.endswith("norm.weight") else value).bfloat16()
                )
        file = f"model-{part.strip('.')}.safetensors"
        save_file(tensors, path / file, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _hub(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor of the model as the hub has it: one for every expert and side."""
    place, _, leaf = name.rpartition(".")
    if leaf == "gate_up_proj":
        gate_up = [half.unbind(0) for half in value.chunk(2, dim=1)]
        sides = dict(zip(("gate_proj", "up_proj"), gate_up, strict=True))
    elif leaf == "down_proj":
        sides = {"down_proj": value.unbind(0)}
    else:
        return {name: value}
    return {
        f"{place}.{e}.{side}.weight": tensor.clone()
        for side, of_expert in sides.items()
        for e, tensor in enumerate(of_expert)
    }


def run(arguments: list[str]) -> dict[str, float]:
    """One command: its seconds (of the clock and of the processor) and its largest resident set."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "flexmoe", *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{arguments} failed")
    done = {
        "seconds": time.perf_counter() - start,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_bytes": usage.ru_maxrss * 1024,
    }
    print(arguments[0], *arguments[-4:], done, flush=True)
    return done


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--size", choices=SIZES, default="large")
    parser.add_argument("--folder", default=None, help="where there is room for five copies")
    options = parser.parse_args()
    *shape, memory = SIZES[options.size]
    limit = parse_bytes(memory)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        base, family, whole = (Path(folder) / name for name in ("base", "family", "whole"))
        write_checkpoint(base, *shape)
        jobs: dict = {}
        result: dict = {
            "checkpoint_bytes": Checkpoint(base).bytes,
            "memory_bytes": limit,
            "tokens": 2 * 32,
            "jobs": jobs,
        }
        compress = ["compress", str(base), "--method", "fisher", *CALIBRATION]
        jobs["compress"] = run([*compress, "-o", str(family), "--memory", memory])
        better = Path(folder) / "better"
        recover = ["recover", str(family), "-o", str(better), "--mode", "closed-form", *CLOSED_FORM]
        jobs["recover"] = run([*recover, "--memory", memory])
        shutil.rmtree(better)
        for layout in LAYOUTS:
            out = Path(folder) / layout
            arguments = ["export", str(family), "-o", str(out), "--pruned", "0.4"]
            jobs[layout] = run([*arguments, "--layout", layout])
            shutil.rmtree(out)
            if options.size == "large":
                save("streaming", result)
        jobs["compress in memory"] = run([*compress, "-o", str(whole)])
        streamed, in_memory = Plan.load(family), Plan.load(whole)
        result["same_widths"] = all(
            torch.equal(streamed.width[i], in_memory.width[i]) for i in streamed.width
        )
        result["places_that_differ"] = max(
            float((streamed.order[i] != in_memory.order[i]).float().mean()) for i in streamed.order
        )
    print(json.dumps(result, indent=1))
    peaks = ", ".join(f"{name} {gib(job['peak_bytes'])}" for name, job in jobs.items())
    print(f"{gib(result['checkpoint_bytes'])} with {gib(limit)}: {peaks}")
    if options.size == "large":
        save("streaming", result)


if __name__ == "__main__":
    main()
