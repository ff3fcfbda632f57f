"""What jobs with default settings take at least, told before torch is loaded: no activations, and
of the time only arithmetic, at a rate measured here.

``work`` in known.json holds the operations of each job for every active parameter, as a dry run of
Qwen3-30B-A3B counts them (``bench/known.py``): they hardly differ from model to model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from flexmoe.doctor.found import Diagnosis, Need
from flexmoe.doctor.sizes import EXPORTED, Sizes
from flexmoe.files import free_disk
from flexmoe.ram import free_ram

STATISTICS, RANK = 1, 16  # a channel, of the default method; of LoRA: its module imports torch
CONTEXT = 8192  # of which a quarter is a window of text; models with less see fewer tokens
EXPORT = "export"  # of such jobs ``work`` has the bytes moved for every byte of the checkpoint


def at_least(
    found: Diagnosis,
    sizes: Sizes,
    context: int,
    device: str,
    work: Mapping[str, float],
) -> None:
    """Fill in ``needs`` on a device as of torch, or ``auto``, and what is free there; without times
    on a GPU, which only torch can ask. ``context``: of the model, in tokens."""
    if device not in ("auto", "cpu") and not device.startswith("cuda"):
        return  # torch refuses it later
    found.device = device if device != "auto" else ("cuda" if _has_gpu() else "cpu")
    cpu = found.device == "cpu"
    found.memory_free, found.disk_free = free_ram() if cpu else 0, free_disk(".")
    needs = _needs(sizes, found)
    if cpu:
        from flexmoe.doctor.pace import pace

        layer = sizes.layers[0]
        operations, moved = pace(layer.H, layer.I)
        active = found.parameters["active"]
        for n, need in enumerate(needs):
            if need.job.startswith(EXPORT):
                seconds = work[EXPORT] * sizes.bytes / moved
            else:
                times = {
                    "compress": min(1.0, context / CONTEXT),
                    "recover --mode closed-form": sizes.moments(found.memory_free)[1],
                }
                seconds = times.get(need.job, 1) * work[need.job] * active / operations
            needs[n] = replace(need, seconds=seconds)
    found.needs = needs


def _needs(sizes: Sizes, found: Diagnosis) -> list[Need]:
    """Without times."""
    cpu = found.device == "cpu"
    itemsize = 4 if cpu else sizes.itemsize
    compress = sizes.compress(itemsize, STATISTICS, masks=True, learned=True)
    routers = sum(layer.E * layer.H for layer in sizes.layers)
    trained = {"router": routers, "lora": sizes.adapters(RANK), "full": sizes.routed + routers}
    recover = [sizes.closed_form(found.memory_free)]
    recover += [sizes.trained(mode, number) for mode, number in trained.items()]
    narrow = next(w.width for w in found.widths if w.pruned == EXPORTED)
    size = sizes.export_bytes(narrow)
    return [
        sizes.held(compress, itemsize, cpu),
        *(sizes.held(need, 4, cpu) for need in recover),
        *(sizes.export(layout, size[layout]) for layout, why in found.exports.items() if not why),
    ]


def _has_gpu() -> bool:
    """Whether torch will find a GPU, as far as can be told without it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    built = "+cpu" not in metadata.version("torch")
    return built and not hidden and any(Path("/dev").glob("nvidia[0-9]*"))
