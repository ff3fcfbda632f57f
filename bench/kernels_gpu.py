"""Ragged experts in Triton on a GPU, on layers of two models' shapes, against torch's grouped_mm
and vLLM's kernel, taken from a folder with its file (see vllm_triton.py).

python bench/kernels_gpu.py --vllm FOLDER              # writes results/kernels_gpu.json
TRITON_INTERPRET=1 python bench/kernels_gpu.py --try   # no GPU: runs once, tiny, writes nothing
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from common import save
from flexmoe.kernels.measure import Call, Routed, Shape
from flexmoe.kernels.measure_gpu import SHAPES, measure

LAYERS = dict(zip(SHAPES, ("Mixtral-8x7B", "Qwen2-57B-A14B"), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny, writes nothing")
    parser.add_argument("--vllm", type=Path, help="folder of fused_moe.py and its configs")
    asked = parser.parse_args()
    if asked.tiny:
        shape, device = Shape(4, 32, 24, 2), "cuda" if torch.cuda.is_available() else "cpu"
        measure((shape,), (1, 9), 1, lambda row: print(row["T"], row["seconds"]), device=device)
        return
    if not torch.cuda.is_available():
        parser.error("no CUDA GPU here. Use --try with TRITON_INTERPRET=1 to only run the code")
    if asked.vllm is None:
        parser.error("--vllm is missing: results without vLLM's kernel are not comparable")
    with tempfile.TemporaryDirectory() as scratch:
        import vllm_triton

        module, gpu = vllm_triton.load(asked.vllm, Path(scratch)), torch.cuda.get_device_name()

        def vllm(routed: Routed, gate_up: Tensor, down: Tensor) -> dict[str, Call]:
            (E, _, I), T = down.shape, len(routed[0])
            tiles = vllm_triton.tuned(asked.vllm, E, I, T, gpu)
            return {"vLLM": vllm_triton.prepared(module, tiles, *routed, gate_up, down)}

        found = measure(
            progress=lambda row: print(row["shape"], row["T"], row["seconds"], flush=True),
            more_peers=vllm,
        )
    rows = [{"layer": LAYERS[Shape(**row["shape"])], **row} for row in found["rows"]]
    save("kernels_gpu", {**found, "rows": rows})


if __name__ == "__main__":
    main()
