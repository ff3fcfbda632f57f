"""Time and memory of the observe pass against a plain forward and backward over the same tokens.

    python bench/observe.py            # measures all and writes results/observe.json

Each variant runs in a process of its own (peak memory); rounds of all variants are interleaved and
medians taken (other load on the machine hits all alike).
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import time

import torch

from common import random_model, save
from flexmoe.data import TINY
from flexmoe.family import load_stock
from flexmoe.methods import all_methods
from flexmoe.observe import observe

VARIANTS = ("plain", "fisher", "heapr", "taylor", "camera")
MODELS = {
    "tiny (4 layers, 16 experts of 64, hidden 128)": None,
    "random (2 layers, 64 experts of 256, hidden 512, top-8)": (2, 64, 256, 512, 8),
    "random (2 layers, 128 experts of 64, hidden 512, top-8)": (2, 128, 64, 512, 8),
}
BATCHES, BATCH, SEQ_LEN, ROUNDS = 2, 8, 256, 7


def run(shape: tuple[int, ...] | None, variant: str) -> None:
    """One process: warm up, then time ``ROUNDS`` rounds on demand of the parent."""
    model = random_model(*shape) if shape else load_stock(TINY / "model", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 4096, (BATCHES * BATCH, SEQ_LEN), generator=generator)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work(model, ids[:BATCH], variant)
    print("ready", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        work(model, ids, variant)
        print(time.perf_counter() - start, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print((peak - before) * 1024, flush=True)


def work(model: torch.nn.Module, ids: torch.Tensor, variant: str) -> None:
    if variant != "plain":
        observe(model, ids, all_methods()[variant].needs, batch_size=BATCH)
        return
    for batch in ids.split(BATCH):
        model(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)


def measure(name: str) -> dict[str, dict[str, float]]:
    """Seconds and extra peak bytes of every variant, and its time as a share of the plain one."""
    command = [sys.executable, __file__, "--worker", name]
    processes = {
        v: subprocess.Popen([*command, v], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for v in VARIANTS
    }
    for process in processes.values():
        assert process.stdout.readline() == "ready\n"
    seconds: dict[str, list[float]] = {v: [] for v in VARIANTS}
    for _ in range(ROUNDS):
        for variant, process in processes.items():
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds[variant].append(float(process.stdout.readline()))
    result = {}
    for variant, process in processes.items():
        process.stdin.close()
        result[variant] = {
            "seconds": statistics.median(seconds[variant]),
            "extra_peak_bytes": float(process.stdout.readline()),
            "ratio_to_plain": statistics.median(
                mine / plain for mine, plain in zip(seconds[variant], seconds["plain"], strict=True)
            ),
        }
        process.wait()
    return result


def main() -> None:
    if "--worker" in sys.argv:
        run(MODELS[sys.argv[-2]], sys.argv[-1])
        return
    models = {name: measure(name) for name in MODELS}
    for name, result in models.items():
        print(name)
        for variant, figures in result.items():
            print(
                f"  {variant:8} {figures['seconds']:6.2f} s  x{figures['ratio_to_plain']:.2f}  "
                f"extra peak {figures['extra_peak_bytes'] / 1e6:.0f} MB"
            )
    tokens = BATCHES * BATCH * SEQ_LEN
    save("observe", {"tokens": tokens, "rounds": ROUNDS, "models": models})


if __name__ == "__main__":
    main()
