"""How long `flexmoe doctor` takes to say what a checkpoint is, and to say everything.

    python bench/glance.py             # writes results/glance.json

The shipped model, and Qwen3-30B-A3B's config with the headers of its 18,867 tensors: files of their
full size without a byte of weights on the disk. Seconds of the clock and of the processor, from the
start of Python to the first line that waits for transformers (the fastest of several looks, each in
a process of its own) and to the end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.core_model_loading import revert_weight_conversion

from common import save
from flexmoe.data import TINY
from flexmoe.headers import INDEX_NAME

LOOKS = 5
WAITS = "loading transformers"  # how the line begins


def write_headers(folder: Path, shard_bytes: int = 4 * 10**9) -> int:
    """Qwen3-30B-A3B with holes for weights; the number of its tensors."""
    config = Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
        num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
        num_experts=128, num_experts_per_tok=8, max_position_embeddings=40960, dtype="bfloat16",
        norm_topk_prob=True,
    )  # fmt: skip
    shutil.copytree(TINY / "model", folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config.architectures = ["Qwen3MoeForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = Qwen3MoeForCausalLM(config)
    stored = revert_weight_conversion(model, dict(model.state_dict()))
    shapes = {name: list(tensor.shape) for name, tensor in stored.items()}
    weight_map, header, end, number = {}, dict[str, Any](), 0, 1
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        weight_map[name] = f"model-{number:05}.safetensors"
        end += size
        if end > shard_bytes or len(weight_map) == len(shapes):
            text = json.dumps(header).encode()
            with (folder / weight_map[name]).open("wb") as file:
                file.write(len(text).to_bytes(8, "little") + text)
                file.truncate(8 + len(text) + end)  # a hole: no disk is taken
            header, end, number = {}, 0, number + 1
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return len(shapes)


def timed(model: str, to_the_end: bool) -> dict[str, float]:
    """One look: seconds until the description stands there, or until the end."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "flexmoe", "doctor", model], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(WAITS) and not to_the_end:
            process.kill()
            break
    seconds = time.perf_counter() - start
    _, _, usage = os.wait4(process.pid, 0)
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        large = Path(folder) / "large"
        tensors = write_headers(large)
        models = {"tiny": "tiny", "Qwen3-30B-A3B": str(large)}
        rows = {}
        for name, path in models.items():
            looks = [timed(path, to_the_end=False) for _ in range(LOOKS)]
            first = min(looks, key=lambda look: look["seconds"])
            whole = timed(path, to_the_end=True)
            rows[name] = {f"first_{key}": value for key, value in first.items()} | whole
            print(name, rows[name], flush=True)
    save("glance", {"looks": LOOKS, "tensors": tensors, "models": rows})


if __name__ == "__main__":
    main()
