"""Shared by the benchmarks: what the numbers were measured on, random models, result files."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import flexmoe

RESULTS = Path(__file__).parent / "results"


def _commit() -> str:
    if "COMMIT" in os.environ:  # a copy whose history is elsewhere; who made it says what of
        return os.environ["COMMIT"]
    git = ["git", "-C", str(Path(__file__).parent)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../src"], capture_output=True, text=True
    )
    return commit.stdout.strip() + (" + changes" if changed.stdout.strip() else "")


COMMIT = _commit()  # of the code as it is imported, not of what is there when a long run ends


def environment() -> dict[str, Any]:
    """Hardware, versions, date and commit of a measurement."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line for line in lines if line.startswith("model name")]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": COMMIT,
        "cpu": names[0].split(":")[1].strip() if names else platform.processor(),
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "flexmoe": flexmoe.__version__,
    }


def save(name: str, result: dict[str, Any]) -> None:
    """Write ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": environment(), **result}, indent=1) + "\n")
    print(f"wrote {path}")


def random_model(
    layers: int, experts: int, channels: int, hidden: int, top_k: int, device: str = "cpu"
) -> Any:
    """A random Qwen3-MoE of the given shape, float32, vocabulary 4096."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=4096,
        hidden_size=hidden,
        intermediate_size=2 * channels,
        moe_intermediate_size=channels,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=hidden // 8,
        num_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=2048,
    )
    with torch.device(device):
        return Qwen3MoeForCausalLM(config).eval()


def expert_bytes(model: Any) -> int:
    """Bytes of the routed experts' weights in a worker."""
    kinds = ("w13_weight", "w2_weight")
    return sum(p.nbytes for name, p in model.named_parameters() if name.endswith(kinds))
