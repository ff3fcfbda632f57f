"""Times of the ragged experts on a GPU against full-width kernels, and against what the GPU can do.

CUDA graphs of several calls, as of the layers of a model. Weights begin outside the caches; those
of layers of some hundred megabytes are in part in them from the second call on.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import mean, median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.kernels.activations import gated
from flexmoe.kernels.interface import Weights, experts
from flexmoe.kernels.measure import BUDGETS, MIXED, Call, Routed, Shape, switch, widths_of, work

SHAPES = (Shape(8, 4096, 14336, 2), Shape(64, 3584, 2560, 8))  # Mixtral-8x7B, Qwen2-57B-A14B
TOKENS = (1, 8, 64, 512, 4096)  # decode at batch 1 to 64, prefill beyond
IN_A_GRAPH = 4  # calls, at least
# calls of other kernels, by name, for tokens, gate and up [E, 2I, H] and down [E, H, I]
MorePeers = Callable[[Routed, Tensor, Tensor], dict[str, Call]]


def measure(
    shapes: tuple[Shape, ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    repeats: int = 21,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
    more_peers: MorePeers = lambda routed, gate_up, down: {},
    device: str = "cuda",
) -> dict[str, Any]:
    """Median times in seconds of every shape and number of tokens, in bfloat16, the least that the
    limits of the GPU allow, and errors against float64 (norm over norm). ``progress`` is told every
    row when it is there. Checks that a captured graph follows switched budgets."""
    on = torch.cuda.device(device) if torch.device(device).type == "cuda" else nullcontext()
    with torch.inference_mode(), on:
        machine = limits(device)
        rows = []
        for shape in shapes:
            torch.manual_seed(0)
            weights, width_BE = weights_of(shape, device), widths_of(shape).to(device)
            _check_switching(shape, weights, width_BE)
            for T in tokens:
                routings_of = routings(shape, T, device)
                row = _row(shape, routings_of, weights, width_BE, machine, repeats, more_peers)
                rows.append(row)
                progress(row)
        return {
            "clock": "CUDA graphs of several calls, L2 emptied before each, interleaved rounds",
            "machine": machine,
            "switch_s": switch(device=device),
            "triton": importlib.metadata.version("triton"),
            "rows": rows,
        }


def _row(
    shape: Shape,
    drawn: list[Routed],
    weights: Weights,
    width_BE: Tensor,
    machine: dict[str, Any],
    repeats: int,
    more_peers: MorePeers,
) -> dict[str, Any]:
    E, H, I, _ = shape
    gate_up = weights.up.view(E, I, 2, H).transpose(1, 2).reshape(E, 2 * I, H)
    down = weights.down.view(E, I, H).mT.contiguous()
    T, device = len(drawn[0][0]), width_BE.device
    mixed_T = (torch.arange(T, device=device) % 3 * 2).int()
    forced = partial(experts, backend="triton")
    calls: dict[str, list[Call]] = {}
    roof_s: dict[str, list[float]] = {}
    error: dict[str, float] = {}
    for routed in drawn:
        own: dict[str, Call] = {"torch grouped_mm": partial(_grouped_mm, *routed, gate_up, down)}
        own |= more_peers(routed, gate_up, down)
        for b, label in enumerate(BUDGETS):
            own[label] = partial(forced, *routed, weights, width_BE, None, b)
            floor = least_s(routed[1], width_BE[b].expand(T, -1), H, machine)
            roof_s.setdefault(label, []).append(floor)
        own[MIXED[0]] = partial(forced, *routed, weights, width_BE, mixed_T)
        roof_s.setdefault(MIXED[0], []).append(
            least_s(routed[1], width_BE[mixed_T.long()], H, machine)
        )
        wanted = [exact(routed, weights, width_E) for width_E in width_BE]
        mixed_TH = torch.stack(wanted)[mixed_T.long(), torch.arange(T, device=device)]
        for label, call in own.items():
            b = BUDGETS.index(label) if label in BUDGETS else 0
            want = mixed_TH if label == MIXED[0] else wanted[b]
            off = float((call() - want).norm() / want.norm().clamp_min(1e-9))
            error[label] = max(off, error.get(label, 0.0))
        apart = [
            partial(forced, *(t[mixed_T == b] for t in routed), weights, width_BE, None, b)
            for b in mixed_T.unique().tolist()
        ]
        own[MIXED[1]] = partial(_all, apart)
        for label, call in own.items():
            calls.setdefault(label, []).append(call)
    return {
        "shape": shape._asdict(),
        "dtype": "bfloat16",
        "T": T,
        "seconds": interleaved(calls, repeats),
        "roof_s": {label: mean(found) for label, found in roof_s.items()},
        "error": error,
    }


def weights_of(shape: Shape, device: str) -> Weights:
    E, H, I, _ = shape
    up_RCH = torch.randn(E * I, 2, H, device=device, dtype=torch.bfloat16) / H**0.5
    down_RH = torch.randn(E * I, H, device=device, dtype=torch.bfloat16) / I**0.5
    offset_E = (torch.arange(E + 1, device=device) * I).int()
    return Weights(up_RCH, down_RH, offset_E, gated("silu"), "silu")


def routings(shape: Shape, T: int, device: str) -> list[Routed]:
    """One of random experts; of a single token so many that every expert is chosen once, so that
    their mean width is that of the layer."""
    E, H, _, K = shape
    draws = E // K if T == 1 else 1
    once = torch.randperm(E)[: draws * K].view(draws, 1, K)
    chosen = once if T == 1 else torch.rand(1, T, E).topk(K).indices
    found = []
    for index_TK in chosen.to(device):
        x_TH = torch.randn(T, H, device=device, dtype=torch.bfloat16)
        weight_TK = torch.rand(T, K, device=device).softmax(1).to(x_TH)
        found.append((x_TH, index_TK, weight_TK))
    return found


def _all(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _grouped_mm(
    x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, gate_up: Tensor, down: Tensor
) -> Tensor:
    (E, H, _), K = down.shape, index_TK.shape[1]
    key_S, order = index_TK.view(-1).sort()
    ends = torch.searchsorted(key_S, torch.arange(E, device=x_TH.device), right=True).int()
    pre = F.grouped_mm(x_TH[order // K], gate_up.mT, offs=ends)
    y = F.grouped_mm(gated("silu")(pre), down.mT, offs=ends) * weight_TK.view(-1, 1)[order]
    return torch.empty_like(y).index_copy_(0, order, y).view(-1, K, H).sum(1)


def limits(device: str) -> dict[str, Any]:
    """Best of what the GPU was seen to do: products of square matrices in bfloat16, and reading or
    copying 4 GiB."""
    n, size = (8192, 2**30) if torch.cuda.is_available() else (64, 2**10)
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    product = min(_seconds(lambda: a @ b, 10))
    read = min(_seconds(source.sum, 10))
    copy = min(_seconds(lambda: target.copy_(source), 10))
    moved = source.nbytes
    rate = {"bfloat16": 2 * n**3 / product}
    return {"flop_per_s": rate, "bytes_per_s": max(moved / read, 2 * moved / copy)}


def least_s(index_TK: Tensor, width_TE: Tensor, H: int, machine: dict[str, Any]) -> float:
    """Seconds that arithmetic of all pairs, or reading weights once, takes at the limits."""
    least = work(index_TK, width_TE, H, torch.bfloat16)
    compute = least["flop"] / machine["flop_per_s"]["bfloat16"]
    return max(compute, least["bytes"] / machine["bytes_per_s"])


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
    if not torch.cuda.is_available():
        return partial(_all, calls)
    _all(calls)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _all(calls)
    return graph.replay


def interleaved(calls: dict[str, list[Call]], repeats: int) -> dict[str, float]:
    """Median over rounds of the time of a call, of several in a graph as the layers of a model are:
    starting a graph is no part of them. They are the draws, or the same some times."""
    several = IN_A_GRAPH if torch.cuda.is_available() else 1
    sequences = {label: found * -(-several // len(found)) for label, found in calls.items()}
    graphs = {label: captured(sequence) for label, sequence in sequences.items()}
    times: dict[str, list[float]] = {label: [] for label in calls}
    cold = torch.empty(2**28 if torch.cuda.is_available() else 1, dtype=torch.int8)
    cold = cold.to("cuda" if torch.cuda.is_available() else "cpu")
    for _ in range(repeats):
        for label, replay in graphs.items():
            cold.zero_()
            times[label].append(_seconds(replay, 1)[0] / len(sequences[label]))
    return {label: median(found) for label, found in times.items()}


def _check_switching(shape: Shape, weights: Weights, width_BE: Tensor) -> None:
    """A captured graph follows the table of widths, and back at budget 0 gives the same bits."""
    (routed,) = routings(shape, 16, str(width_BE.device))
    active_1E = width_BE[:1].clone()
    out: list[Tensor] = []
    replay = captured([lambda: out.append(experts(*routed, weights, active_1E, backend="triton"))])
    for b in [0, *range(len(BUDGETS)), 0]:
        active_1E.copy_(width_BE[b : b + 1])
        replay()
        want = experts(*routed, weights, width_BE, None, b, backend="triton")
        if not torch.equal(out[1 if torch.cuda.is_available() else -1], want):
            raise AssertionError(f"a captured graph at {BUDGETS[b]} is not what a call gives")
