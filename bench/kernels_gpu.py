"""Ragged experts in Triton against full-width peers on a GPU: torch's grouped_mm and, where vLLM
is installed, its fused kernel.

python bench/kernels_gpu.py                        # writes results/kernels_gpu.json
TRITON_INTERPRET=1 python bench/kernels_gpu.py --try   # no GPU: runs once, tiny, writes nothing
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import suppress
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import save
from flexmoe.kernels import Weights, experts
from flexmoe.kernels.measure import Shape

SHAPES = {
    "Mixtral-8x7B": Shape(8, 4096, 14336, 2),
    "Qwen2-57B-A14B": Shape(64, 3584, 2560, 8),
}
TOKENS = (1, 8, 64, 512, 4096)  # decode at batch 1 to 64, prefill beyond


def weights_of(shape: Shape, device: str) -> Weights:
    E, H, I, _ = shape
    up_RCH = torch.randn(E * I, 2, H, device=device, dtype=torch.bfloat16) / H**0.5
    down_RH = torch.randn(E * I, H, device=device, dtype=torch.bfloat16) / I**0.5
    offset_E = (torch.arange(E + 1, device=device) * I).int()
    return Weights(up_RCH, down_RH, offset_E, _silu, "silu")


def _silu(pre: Tensor) -> Tensor:
    gate, up = pre.chunk(2, -1)
    return F.silu(gate) * up


def peers(shape: Shape, weights: Weights) -> dict[str, Callable[..., Tensor]]:
    """Other kernels on the same experts, always at full width."""
    E, H, I, K = shape
    gate_up = weights.up.view(E, I, 2, H).transpose(1, 2).reshape(E, 2 * I, H)
    down = weights.down.view(E, I, H)
    fused_down = down.mT.contiguous()

    def grouped_mm(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        key_S, order = index_TK.view(-1).sort()
        ends = torch.searchsorted(key_S, torch.arange(E, device=x_TH.device), right=True).int()
        h = _silu(F.grouped_mm(x_TH[order // K], gate_up.mT, offs=ends))
        y = F.grouped_mm(h, down, offs=ends) * weight_TK.view(-1, 1)[order]
        return torch.empty_like(y).index_copy_(0, order, y).view(-1, K, H).sum(1)

    found: dict[str, Callable[..., Tensor]] = {"torch grouped_mm": grouped_mm}
    with suppress(ImportError):
        from vllm.model_executor.layers.fused_moe import fused_experts

        if torch.cuda.is_available():
            found["vLLM fused_experts"] = lambda x, index, weight: fused_experts(
                x, gate_up, fused_down, weight.float(), index.int()
            )
    return found


def graph_s(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of a call replayed from a CUDA graph; without a GPU, of the call."""
    call()
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return [time.perf_counter() - start]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    cold = torch.empty(2**28, dtype=torch.int8, device="cuda")  # larger than the L2 cache
    times = []
    for _ in range(repeats):
        cold.zero_()
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return times


def rows(name: str, shape: Shape, tokens: tuple[int, ...], repeats: int, device: str) -> Any:
    E, H, I, K = shape
    torch.manual_seed(0)
    weights = weights_of(shape, device)
    others = peers(shape, weights)
    share_E = torch.linspace(0.1, 0.9, E)[torch.randperm(E)]
    width_BE = torch.stack([torch.full((E,), I), (share_E * I).round().long()]).int().to(device)
    for T in tokens:
        x_TH = torch.randn(T, H, device=device, dtype=torch.bfloat16)
        weight_TK, index_TK = torch.rand(T, E, device=device).topk(K)
        routed = (x_TH, index_TK, weight_TK.to(x_TH))
        calls = {
            label: lambda b=b, r=routed: experts(*r, weights, width_BE, None, b, backend="triton")
            for b, label in enumerate(("100 %", "50 % ragged"))
        }
        calls |= {label: lambda f=f, r=routed: f(*r) for label, f in others.items()}
        want = calls["torch grouped_mm"]().float()
        error = float((calls["100 %"]().float() - want).abs().max() / want.abs().max())
        seconds = {label: median(graph_s(call, repeats)) for label, call in calls.items()}
        yield {"layer": name, "T": T, "seconds": seconds, "error": error}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny, writes nothing")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        parser.error("no CUDA GPU here. Use --try with TRITON_INTERPRET=1 to only run the code")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"tiny": Shape(4, 64, 48, 2)} if tiny else SHAPES
    found = []
    with torch.inference_mode():
        for name, shape in shapes.items():
            for row in rows(name, shape, (1, 9) if tiny else TOKENS, 1 if tiny else 21, device):
                print(row, flush=True)
                found.append(row)
    if not tiny:
        save("kernels_gpu", {"clock": "CUDA graph, L2 emptied before every replay", "rows": found})


if __name__ == "__main__":
    main()
