"""Whole models at every budget against transformers on the unpruned model, end to end.

python bench/model_speed.py                # writes results/model_speed.json, 10 minutes on one core
python bench/model_speed.py --batch 1,8    # a quarter of the time

The shipped model's family, and a family of a larger random model (speed does not depend on what it
knows). "flexmoe, torch loop" is the same with FLEXMOE_KERNEL=torch, measured right after. On a
processor without AVX-512, where torch computes bfloat16 at a hundredth of its float32 rate, only
float32 is measured, into results/model_speed-avx2.json.

python bench/model_speed.py --device cuda  # writes results/model_speed-gpu.json

On a GPU: one larger random model, in bfloat16, without the loop.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from common import random_model, save
from flexmoe.kernels import cpu

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SHARES = (0.0, 0.4, 0.6)
REPEATS = {"cpu": 2, "cuda": 5}
Layers = dict[str, int]
LARGE: Layers = {"layers": 4, "experts": 32, "hidden": 1024, "channels": 512, "top_k": 4}
LARGER: Layers = {"layers": 4, "experts": 64, "hidden": 2048, "channels": 1024, "top_k": 8}


def name_of(shape: Layers) -> str:
    return (
        "random Qwen3-MoE, {layers} layers, E {experts}, H {hidden}, I {channels}, "
        "top-{top_k}".format(**shape)
    )


def random_family(folder: Path, shape: Layers, device: str) -> Path:
    """A family at a random ranking and random nested widths."""
    from flexmoe.exporter import write_family
    from helpers import random_plan

    model = random_model(**shape, device=device)
    if device != "cpu":
        model = model.to(torch.bfloat16).to("cpu")
    model.save_pretrained(folder / "base")
    plan = random_plan(model, folder / "base", SHARES, quantum=32)
    write_family(folder / "base", plan, folder / "large")
    return folder / "large"


def tiny_family(folder: Path) -> Path:
    from flexmoe.pipeline import CompressConfig, compress

    config = CompressConfig(allocate="global", pruned=SHARES[1:], device="cpu")
    compress("tiny", folder / "tiny", config)
    return folder / "tiny"


def rows(
    name: str, path: Path, dtype: str, batches: tuple[int, ...], device: str
) -> list[dict[str, Any]]:
    from flexmoe.kernels import interface
    from flexmoe.speed import SpeedConfig, measure

    settings = {"repeats": REPEATS[device], "pruned": SHARES, "device": device, "dtype": dtype}
    print(name, dtype, flush=True)
    found = measure(str(path), SpeedConfig(batches=batches, **settings))["rows"]
    if device != "cpu":
        return [{"model": name, "dtype": dtype, **row} for row in found]
    interface.FORCED = "torch"  # as FLEXMOE_KERNEL=torch
    try:
        loop = measure(str(path), SpeedConfig(batches=batches[:2], **settings))["rows"]
    finally:
        interface.FORCED = None
    own = [row for row in loop if row["engine"] == "flexmoe"]
    found += [{**row, "engine": "flexmoe, torch loop"} for row in own]
    return [{"model": name, "dtype": dtype, **row} for row in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,8,64")
    parser.add_argument("--device", default="cpu", choices=REPEATS)
    asked = parser.parse_args()
    batches, device = tuple(map(int, asked.batch.split(","))), asked.device
    about = {"prompt": 128, "new": 16, "repeats": REPEATS[device]}
    if device == "cuda":
        with tempfile.TemporaryDirectory() as folder:
            path = random_family(Path(folder), LARGER, device)
            found = rows(name_of(LARGER), path, "bfloat16", batches, device)
        clock = "wall clock, GPU synchronised"
        save("model_speed-gpu", {"clock": clock, **about, "rows": found})
        return
    torch.set_num_threads(1)
    plain = cpu._target() == "AVX2"
    with tempfile.TemporaryDirectory() as folder:
        large = random_family(Path(folder), LARGE, device)
        models = {"tiny": tiny_family(Path(folder)), name_of(LARGE): large}
        found = [
            row
            for name, path in models.items()
            for dtype in (("float32",) if plain else ("float32", "bfloat16"))
            for row in rows(name, path, dtype, batches, device)
        ]
    about["clock"] = "CPU time of one thread"
    save("model_speed-avx2" if plain else "model_speed", {**about, "rows": found})


if __name__ == "__main__":
    main()
