"""Whole models at every budget against transformers on the unpruned model, end to end.

python bench/model_speed.py                # writes results/model_speed.json, 10 minutes on one core
python bench/model_speed.py --batch 1,8    # a quarter of the time

The shipped model's family, and a family of a larger random model (speed does not depend on what it
knows). "flexmoe, torch loop" is the same with FLEXMOE_KERNEL=torch, measured right after. On a
processor without AVX-512, where torch computes bfloat16 at a hundredth of its float32 rate, only
float32 is measured, into results/model_speed-avx2.json.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import random_model, save

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

SHARES = (0.0, 0.4, 0.6)
REPEATS = 2
LARGE = "random Qwen3-MoE, 4 layers, E 32, H 1024, I 512, top-4"


def large_family(folder: Path) -> Path:
    """A family at a random ranking and random nested widths."""
    from flexmoe.exporter import write_family
    from helpers import random_plan

    model = random_model(layers=4, experts=32, channels=512, hidden=1024, top_k=4)
    model.save_pretrained(folder / "base")
    plan = random_plan(model, folder / "base", SHARES, quantum=32)
    write_family(folder / "base", plan, folder / "large")
    return folder / "large"


def tiny_family(folder: Path) -> Path:
    from flexmoe.pipeline import CompressConfig, compress

    config = CompressConfig(allocate="global", pruned=SHARES[1:], device="cpu")
    compress("tiny", folder / "tiny", config)
    return folder / "tiny"


def rows(name: str, path: Path, dtype: str, batches: tuple[int, ...]) -> list[dict[str, Any]]:
    from flexmoe.speed import SpeedConfig, measure

    settings = {"repeats": REPEATS, "pruned": SHARES, "device": "cpu", "dtype": dtype}
    print(name, dtype, flush=True)
    found = measure(str(path), SpeedConfig(batches=batches, **settings))["rows"]
    os.environ["FLEXMOE_KERNEL"] = "torch"
    try:
        loop = measure(str(path), SpeedConfig(batches=batches[:2], **settings))["rows"]
    finally:
        del os.environ["FLEXMOE_KERNEL"]
    own = [row for row in loop if row["engine"] == "flexmoe"]
    found += [{**row, "engine": "flexmoe, torch loop"} for row in own]
    return [{"model": name, "dtype": dtype, **row} for row in found]


def main() -> None:
    import torch

    from flexmoe.kernels import cpu

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", default="1,8,64")
    batches = tuple(map(int, parser.parse_args().batch.split(",")))
    torch.set_num_threads(1)
    plain = cpu._target() == "AVX2"
    with tempfile.TemporaryDirectory() as folder:
        models = {"tiny": tiny_family(Path(folder)), LARGE: large_family(Path(folder))}
        found = [
            row
            for name, path in models.items()
            for dtype in (("float32",) if plain else ("float32", "bfloat16"))
            for row in rows(name, path, dtype, batches)
        ]
    about = {"clock": "CPU time of one thread", "prompt": 128, "new": 16, "repeats": REPEATS}
    save("model_speed-avx2" if plain else "model_speed", {**about, "rows": found})


if __name__ == "__main__":
    main()
