"""Ragged experts in Triton against full-width peers on a GPU, and against what the GPU can do:
torch's grouped_mm, and vLLM's kernel, taken from a folder with its file (see vllm_triton.py).

python bench/kernels_gpu.py --vllm FOLDER              # writes results/kernels_gpu.json
TRITON_INTERPRET=1 python bench/kernels_gpu.py --try   # no GPU: runs once, tiny, writes nothing
"""

from __future__ import annotations

import argparse
import importlib.metadata
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common import save
from flexmoe.kernels import Weights, experts
from flexmoe.kernels.activations import gated
from flexmoe.kernels.measure import Shape, switch

SHAPES = {
    "Mixtral-8x7B": Shape(8, 4096, 14336, 2),
    "Qwen2-57B-A14B": Shape(64, 3584, 2560, 8),
}
TOKENS = (1, 8, 64, 512, 4096)  # decode at batch 1 to 64, prefill beyond
BUDGETS = ("100 %", "80 %", "60 %", "50 % ragged", "40 %")
IN_A_GRAPH = 4  # calls, at least
Call = Callable[[], Any]
Routed = tuple[Tensor, Tensor, Tensor]


def weights_of(shape: Shape, device: str) -> Weights:
    E, H, I, _ = shape
    up_RCH = torch.randn(E * I, 2, H, device=device, dtype=torch.bfloat16) / H**0.5
    down_RH = torch.randn(E * I, H, device=device, dtype=torch.bfloat16) / I**0.5
    offset_E = (torch.arange(E + 1, device=device) * I).int()
    return Weights(up_RCH, down_RH, offset_E, gated("silu"), "silu")


def widths_of(shape: Shape, device: str) -> Tensor:
    """Widths of every budget, spread evenly around their mean, the same experts wide in each."""
    E, I = shape.E, shape.I
    order = torch.randperm(E)
    spans = ((1, 1), (0.6, 1), (0.2, 1), (0.1, 0.9), (0, 0.8))
    shares = [torch.linspace(a, b, E)[order] for a, b in spans]
    return torch.stack([(share_E * I).round() for share_E in shares]).int().to(device)


def routings(shape: Shape, T: int, device: str) -> list[Routed]:
    """One of random experts; of a single token so many that every expert is chosen once, so that
    their mean width is that of the layer."""
    E, H, _, K = shape
    draws = E // K if T == 1 else 1
    chosen = torch.randperm(E).view(draws, 1, K) if T == 1 else torch.rand(1, T, E).topk(K).indices
    found = []
    for index_TK in chosen.to(device):
        x_TH = torch.randn(T, H, device=device, dtype=torch.bfloat16)
        weight_TK = torch.rand(T, K, device=device).softmax(1).to(x_TH)
        found.append((x_TH, index_TK, weight_TK))
    return found


class Peers:
    """Other kernels on the same experts, always at full width."""

    def __init__(self, shape: Shape, weights: Weights, folder: Path | None, work: Path) -> None:
        E, H, I, _ = shape
        self.shape, self.folder, self.work = shape, folder, work
        self.gate_up = weights.up.view(E, I, 2, H).transpose(1, 2).reshape(E, 2 * I, H)
        self.down = weights.down.view(E, I, H).mT.contiguous()

    def calls(self, routed: Routed) -> dict[str, Call]:
        found: dict[str, Call] = {"torch grouped_mm": partial(self.grouped_mm, *routed)}
        if self.folder is not None:
            import vllm_triton

            E, _, I, _ = self.shape
            module = vllm_triton.load(self.folder, self.work)
            gpu = torch.cuda.get_device_name()
            tiles = vllm_triton.tuned(self.folder, E, I, len(routed[0]), gpu)
            found["vLLM"] = vllm_triton.prepared(module, tiles, *routed, self.gate_up, self.down)
        return found

    def grouped_mm(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        E, H, _, K = self.shape
        key_S, order = index_TK.view(-1).sort()
        ends = torch.searchsorted(key_S, torch.arange(E, device=x_TH.device), right=True).int()
        pre = F.grouped_mm(x_TH[order // K], self.gate_up.mT, offs=ends)
        y = F.grouped_mm(gated("silu")(pre), self.down.mT, offs=ends)
        y = y * weight_TK.view(-1, 1)[order]
        return torch.empty_like(y).index_copy_(0, order, y).view(-1, K, H).sum(1)


def limits(device: str) -> dict[str, float]:
    """Best of what the GPU was seen to do: products of square matrices in bfloat16, and reading or
    copying 4 GiB."""
    n, size = (8192, 2**30) if device == "cuda" else (64, 2**10)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    product = min(_seconds(lambda: a @ b, 10))
    read = min(_seconds(source.sum, 10))
    copy = min(_seconds(lambda: target.copy_(source), 10))
    moved = source.nbytes
    return {"flop_per_s": 2 * n**3 / product, "bytes_per_s": max(moved / read, 2 * moved / copy)}


def work(index_TK: Tensor, width_TE: Tensor, H: int, machine: dict[str, float]) -> float:
    """Seconds that arithmetic of all pairs, or reading weights once, takes at the limits."""
    width_TK = width_TE.gather(1, index_TK).long()
    widest_E = torch.zeros_like(width_TE[0]).long()
    widest_E.scatter_reduce_(0, index_TK.flatten(), width_TK.flatten(), "amax")
    compute = 6 * H * int(width_TK.sum()) / machine["flop_per_s"]
    return max(compute, 6 * H * int(widest_E.sum()) / machine["bytes_per_s"])


def exact(routed: Routed, weights: Weights, width_E: Tensor) -> Tensor:
    """In float64, expert by expert."""
    x_TH, index_TK, weight_TK = routed
    out_TH = torch.zeros_like(x_TH, dtype=torch.float64)
    assert weights.offset_E is not None
    for e, (start, width) in enumerate(
        zip(weights.offset_E.tolist(), width_E.tolist(), strict=False)
    ):
        token, choice = (index_TK == e).nonzero(as_tuple=True)
        gate, up = weights.up[start : start + width].double().unbind(1)
        x = x_TH[token].double()
        y = (F.silu(x @ gate.T) * (x @ up.T)) @ weights.down[start : start + width].double()
        out_TH.index_add_(0, token, y * weight_TK[token, choice, None].double())
    return out_TH


def _seconds(call: Call, repeats: int) -> list[float]:
    """Of calls one by one; on a GPU by its own clock."""
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return [time.perf_counter() - start]
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return times


def captured(calls: list[Call]) -> Call:
    """Replays a CUDA graph of calls, one after the other; without a GPU calls them."""

    def run() -> None:
        for call in calls:
            call()

    run()
    if not torch.cuda.is_available():
        return run
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def interleaved(calls: dict[str, list[Call]], repeats: int) -> dict[str, float]:
    """Median over rounds of the time of a call, of several in a graph as the layers of a model are:
    starting a graph is no part of them. They are the draws, or the same some times, which does not
    bring weights of gigabytes into a cache of some 50 MB."""
    sequences = {label: found * -(-IN_A_GRAPH // len(found)) for label, found in calls.items()}
    graphs = {label: captured(sequence) for label, sequence in sequences.items()}
    times: dict[str, list[float]] = {label: [] for label in calls}
    cold = torch.empty(2**28 if torch.cuda.is_available() else 1, dtype=torch.int8)
    cold = cold.to("cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(repeats):
        for label, replay in graphs.items():
            cold.zero_()
            times[label].append(_seconds(replay, 1)[0] / len(sequences[label]))
    return {label: median(found) for label, found in times.items()}


def rows(
    name: str,
    shape: Shape,
    tokens: tuple[int, ...],
    repeats: int,
    device: str,
    machine: dict[str, float],
    folder: Path | None,
    scratch: Path,
) -> Iterator[dict[str, Any]]:
    torch.manual_seed(0)
    weights, width_BE = weights_of(shape, device), widths_of(shape, device)
    peers = Peers(shape, weights, folder, scratch)
    forced = partial(experts, backend="triton")
    for T in tokens:
        mixed_T = (torch.arange(T, device=device) % 3 * 2).int()  # 100, 60 and 40 %
        calls: dict[str, list[Call]] = {}
        roof_s: dict[str, list[float]] = {}
        error: dict[str, float] = {}
        for routed in routings(shape, T, device):
            own: dict[str, Call] = peers.calls(routed)
            for b, label in enumerate(BUDGETS):
                own[label] = partial(forced, *routed, weights, width_BE, None, b)
                floor = work(routed[1], width_BE[b].expand(T, -1), shape.H, machine)
                roof_s.setdefault(label, []).append(floor)
            own["three budgets"] = partial(forced, *routed, weights, width_BE, mixed_T)
            floor = work(routed[1], width_BE[mixed_T.long()], shape.H, machine)
            roof_s.setdefault("three budgets", []).append(floor)
            batches = [
                partial(forced, *(t[mixed_T == b] for t in routed), weights, width_BE, None, b)
                for b in mixed_T.unique().tolist()
            ]
            own["three batches"] = lambda batches=batches: [call() for call in batches]
            for label, call in own.items():
                calls.setdefault(label, []).append(call)
            wanted = [exact(routed, weights, width_E) for width_E in width_BE]
            mixed_TH = torch.stack(wanted)[mixed_T.long(), torch.arange(T, device=device)]
            for label, call in own.items():
                if label == "three batches":
                    continue
                b = BUDGETS.index(label) if label in BUDGETS else 0
                want = mixed_TH if label == "three budgets" else wanted[b]
                off = float((call() - want).norm() / want.norm())
                error[label] = max(off, error.get(label, 0.0))
        row = {"layer": name, "shape": shape._asdict(), "T": T, "dtype": "bfloat16"}
        row |= {"roof_s": {label: mean(found) for label, found in roof_s.items()}, "error": error}
        yield row | {"seconds": interleaved(calls, repeats)}


def switching(shape: Shape, device: str) -> None:
    """A captured graph follows the table of widths, and back at budget 0 gives the same bits."""
    weights, width_BE = weights_of(shape, device), widths_of(shape, device)
    (routed,) = routings(shape, 16, device)
    active_1E = width_BE[:1].clone()
    out: list[Tensor] = []
    replay = captured([lambda: out.append(experts(*routed, weights, active_1E, backend="triton"))])
    for b in [0, *range(len(BUDGETS)), 0]:
        active_1E.copy_(width_BE[b : b + 1])
        replay()
        want = experts(*routed, weights, width_BE, None, b, backend="triton")
        assert torch.equal(out[1 if torch.cuda.is_available() else -1], want), BUDGETS[b]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--try", dest="tiny", action="store_true", help="tiny, writes nothing")
    parser.add_argument("--vllm", type=Path, help="folder of fused_moe.py and its configs")
    asked = parser.parse_args()
    tiny = asked.tiny
    if not tiny and not torch.cuda.is_available():
        parser.error("no CUDA GPU here. Use --try with TRITON_INTERPRET=1 to only run the code")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shapes = {"tiny": Shape(4, 64, 48, 2)} if tiny else SHAPES
    tokens, repeats = ((1, 9), 1) if tiny else (TOKENS, 21)
    found = []
    with torch.inference_mode(), tempfile.TemporaryDirectory() as scratch:
        machine = limits(device)
        print(machine, flush=True)
        for name, shape in shapes.items():
            switching(shape, device)
            rest = (tokens, repeats, device, machine, asked.vllm, Path(scratch))
            for row in rows(name, shape, *rest):
                print(row["layer"], row["T"], row["seconds"], row["error"], flush=True)
                found.append(row)
        clock = "CUDA graphs of several calls, L2 emptied before each, interleaved rounds"
        result = {"clock": clock, "machine": machine, "switch_s": switch(device=device)}
        result |= {"triton": importlib.metadata.version("triton"), "rows": found}
    if not tiny:
        save("kernels_gpu", result)


if __name__ == "__main__":
    main()
