"""Speed and memory of every budget in vLLM, against stock vLLM on the same model in one run.

    .venv-vllm/bin/python bench/vllm_speed.py      # make test-vllm sets that environment up

A random Qwen3-MoE (speed does not depend on what it knows). Every engine is a process of its own;
the engines take turns, several rounds of it, and the medians count. Stock vLLM serves the whole
model and a uniform export, with its own kernels; flexmoe the family and a ragged export.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SHARES = (0.0, 0.2, 0.4, 0.6)
MEMBER = 0.4
BATCHES = (1, 8)
PROMPT, NEW, REPEATS, ROUNDS = 256, 48, 3, 1


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


def measure(model: str, labels: list[str | None]) -> dict[str, Any]:
    """Milliseconds for a prompt and for a further token, and bytes of the experts, by label."""
    from vllm import LLM, SamplingParams

    from common import expert_bytes  # a function that goes to workers must not be of __main__

    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=512,
        max_num_seqs=max(BATCHES),
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        seed=0,
        **({"quantization": "flexmoe"} if labels != [None] and "family" in model else {}),
    )
    found: dict[str, Any] = {"expert_bytes": sum(llm.apply_model(expert_bytes)), "rows": []}
    rows: dict[tuple[str | None, int], list[tuple[float, float]]] = {}
    for repeat in range(REPEATS + 1):
        for label in labels:
            for batch in BATCHES:
                times = []
                for new in (1, NEW):
                    params = SamplingParams(
                        temperature=0,
                        max_tokens=new,
                        ignore_eos=True,
                        detokenize=False,
                        extra_args=label and {"flexmoe_budget": label},
                    )
                    ids = [
                        [(7 * i + 13 * b) % 4000 + 5 for i in range(PROMPT)] for b in range(batch)
                    ]
                    start = time.perf_counter()
                    llm.generate([{"prompt_token_ids": x} for x in ids], params, use_tqdm=False)
                    times.append(time.perf_counter() - start)
                if repeat:  # the first time warms up
                    per_token = (times[1] - times[0]) / (NEW - 1)
                    rows.setdefault((label, batch), []).append((times[0], per_token))
    for (label, batch), seen in rows.items():
        prefill, decode = (statistics.median(part) * 1e3 for part in zip(*seen, strict=True))
        found["rows"].append(
            {"budget": label, "batch": batch, "prefill_ms": prefill, "decode_ms": decode}
        )
    return found


ENGINES: dict[str, tuple[str, list[str | None]]] = {
    "stock vLLM, whole model": ("base", [None]),
    "stock vLLM, uniform export at 40 %": ("uniform", [None]),
    "flexmoe, family": ("family", ["0", "20", "40", "60"]),
    "flexmoe, ragged export at 40 %": ("ragged", ["40"]),
}


def main() -> None:
    from common import save

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)  # FOLDER LABEL ...: a process
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args()
    if asked.one:
        model, *labels = asked.one
        print("FOUND", json.dumps(measure(model, [None if x == "-" else x for x in labels])))
        return
    env = {
        **os.environ,
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # apply_model sends a function of ours
        "PYTHONPATH": os.pathsep.join(
            [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        ),
    }
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in ENGINES}
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder))
        for _ in range(asked.rounds):
            for name, (model, labels) in ENGINES.items():
                one = [f"{folder}/{model}", *(label or "-" for label in labels)]
                done = subprocess.run(
                    [sys.executable, __file__, "--one", *one],
                    env=env,
                    capture_output=True,
                    text=True,
                )
                lines = [x for x in done.stdout.splitlines() if x.startswith("FOUND ")]
                if not lines:
                    raise SystemExit((done.stdout + done.stderr)[-4000:])
                runs[name].append(json.loads(lines[0].removeprefix("FOUND ")))
                print(name, runs[name][-1], flush=True)
    rows = []
    for name, found in runs.items():
        for at, row in enumerate(found[0]["rows"]):
            middle = {
                key: statistics.median(run["rows"][at][key] for run in found)
                for key in ("prefill_ms", "decode_ms")
            }
            rows.append({"engine": name, "expert_bytes": found[0]["expert_bytes"], **row, **middle})
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
