"""Speed and memory of every budget in vLLM, against stock vLLM on the same model in one run.

    .venv-vllm/bin/python bench/vllm_speed.py      # make test-vllm sets that environment up

A random Qwen3-MoE (speed does not depend on what it knows). Every engine is a process of its own,
all stay up and take turns, one measurement each, so that a slow minute of the machine is shared;
medians count. Stock vLLM serves the whole model and a uniform export, with its own kernels; flexmoe
the family and a ragged export. The family runs in a second process too: how far apart two processes
of the same thing are is how much a difference between two rows can mean.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

SHARES = (0.0, 0.2, 0.4, 0.6)
MEMBER = 0.4
BATCHES = (1, 8)
PROMPT, NEW, REPEATS, ROUNDS = 256, 48, 3, 3
ENGINES: dict[str, tuple[str, list[str | None]]] = {
    "stock vLLM, whole model": ("base", [None]),
    "stock vLLM, uniform export at 40 %": ("uniform", [None]),
    "flexmoe, family": ("family", ["0", "20", "40", "60"]),
    "flexmoe, family in a second process": ("family", ["40"]),
    "flexmoe, ragged export at 40 %": ("ragged", ["40"]),
}


def make(folder: Path) -> None:
    """The model, its family at a random ranking, and two exports."""
    import torch

    from common import random_model

    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from flexmoe.exporter import export, write_family
    from helpers import random_plan

    model = random_model(layers=4, experts=32, channels=512, hidden=512, top_k=4)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "base")
    plan = random_plan(model, folder / "base", SHARES, quantum=32)
    del model
    torch.manual_seed(0)
    write_family(folder / "base", plan, folder / "family")
    for layout in ("ragged", "uniform"):
        export(folder / "family", folder / layout, pruned=MEMBER, layout=layout)


def engine(pipe: Connection, model: str, quantization: str | None) -> None:
    """A process: sends the bytes of its experts, then answers (budget, batch) with the seconds of
    a prompt and of each further token."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())
    from vllm import LLM, SamplingParams

    from common import expert_bytes

    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        quantization=quantization,
    )
    pipe.send(sum(llm.apply_model(expert_bytes)))
    while (asked := pipe.recv()) is not None:
        budget, batch = asked
        times = []
        for new in (1, NEW):
            params = SamplingParams(
                temperature=0,
                max_tokens=new,
                ignore_eos=True,
                detokenize=False,
                extra_args=budget and {"flexmoe_budget": budget},
            )
            ids = [[(7 * i + 13 * b) % 4000 + 5 for i in range(PROMPT)] for b in range(batch)]
            start = time.perf_counter()
            llm.generate([{"prompt_token_ids": x} for x in ids], params, use_tqdm=False)
            times.append(time.perf_counter() - start)
        pipe.send((times[0], (times[1] - times[0]) / (NEW - 1)))


def start(folder: Path) -> dict[str, tuple[Connection, Any, int]]:
    """Every engine, up: its pipe, its process, and the bytes of its experts."""
    context = multiprocessing.get_context("spawn")
    running = {}
    for name, (model, _) in ENGINES.items():
        here, there = context.Pipe()
        quantization = "flexmoe" if model == "family" else None
        process = context.Process(target=engine, args=(there, str(folder / model), quantization))
        process.start()
        there.close()  # else its death would not be seen
        running[name] = (here, process, here.recv())
        print(f"{name}: up, {running[name][2] / 2**20:.0f} MiB of experts", flush=True)
    return running


def main() -> None:
    from common import save

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    os.environ.update(
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_ALLOW_INSECURE_SERIALIZATION="1",  # apply_model sends a function of ours
    )
    keys = [(name, budget) for name, (_, budgets) in ENGINES.items() for budget in budgets]
    seen: dict[Any, list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        running = start(Path(folder))
        began = time.monotonic()
        for turn in range(asked.rounds * REPEATS + 1):  # the first warms up
            for batch in BATCHES:
                for name, budget in keys:
                    pipe = running[name][0]
                    pipe.send((budget, batch))
                    found = pipe.recv()
                    if turn:
                        seen.setdefault((name, budget, batch), []).append(found)
            print(f"turn {turn}: {time.monotonic() - began:.0f} s", flush=True)
        for pipe, process, _ in running.values():
            pipe.send(None)
            process.join()
    rows = []
    for (name, budget, batch), found in seen.items():
        prefill, decode = zip(*found, strict=True)
        rows.append(
            {
                "engine": name,
                "expert_bytes": running[name][2],
                "budget": budget,
                "batch": batch,
                "prefill_ms": statistics.median(prefill) * 1e3,
                "decode_ms": statistics.median(decode) * 1e3,
            }
        )
    about = {
        "vllm": version("vllm-cpu"),
        "model": "Qwen3-MoE, 4 layers, E 32, I 512, H 512, top-4, float32",
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "rounds": asked.rounds,
        "repeats": REPEATS,
        "rows": rows,
    }
    save("vllm", about)


if __name__ == "__main__":
    main()
