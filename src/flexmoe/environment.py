"""On what something was made or measured, as records keep it."""

from __future__ import annotations

import platform
from pathlib import Path

import torch
import transformers

import flexmoe


def versions() -> dict[str, str]:
    """Of flexmoe and what it computes with."""
    return {
        "flexmoe": flexmoe.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def hardware(device: torch.device) -> str:
    """What ``device`` is, for people: the GPU's name, or threads and name of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.is_file() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{threads} thread{'' if threads == 1 else 's'} of {name}"
