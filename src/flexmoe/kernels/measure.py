"""Times of the ragged experts against what a user would run instead, and against the machine.

CPU time of one thread, so that other work on the machine disturbs little. Before every call caches
are emptied and the same is computed with the weights of another layer. In a model one layer follows
another too: its weights are out of the caches, its code is as near as the layer before left it.

What counts is the half of the rounds in which the machine was fastest at products of matrices,
which are none of those compared: other machines on the same host slow it down for seconds or
minutes, some of what is compared more than the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import cache, partial
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from flexmoe.kernels.activations import gated
from flexmoe.kernels.interface import Weights, experts

SLOW_S = 2.0  # calls that take longer are measured once
LARGER_THAN_CACHES = 2**29  # bytes; a machine measured here has 480 MiB
PREVIOUS = 8  # tokens, at most, of the layer before
Call = Callable[[], Any]
Routed = tuple[Tensor, Tensor, Tensor]  # tokens, experts of each, their weights


class Shape(NamedTuple):
    """Of a MoE layer: experts, hidden, channels of an expert, experts per token."""

    E: int
    H: int
    I: int
    K: int


SHAPES = (Shape(64, 2048, 1024, 8), Shape(32, 1024, 512, 4))
TOKENS = (1, 8, 64, 512)
DTYPES = (torch.float32, torch.bfloat16)
BUDGETS = ("100 %", "80 %", "60 %", "50 % ragged", "40 %")
SPANS = ((1, 1), (0.6, 1), (0.2, 1), (0.1, 0.9), (0, 0.8))  # shares of channels of an expert
MIXED = ("three budgets", "three batches")  # of 100, 60 and 40 %, in one batch and each in its own
PRODUCTS, READS = "products", "reads"  # the limits of the machine


def measure(
    shapes: tuple[Shape, ...] = SHAPES,
    tokens: tuple[int, ...] = TOKENS,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    repeats: int = 7,
    progress: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Median times in seconds of every shape, dtype and number of tokens; how fast the machine
    computes and reads at most, at first and in the rounds of every row; the time of a switch.
    ``progress`` is told every row when it is there."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            most, rows = limits(), []
            for row in (
                r for s in shapes for d in dtypes for r in _rows(s, d, tokens, repeats, most)
            ):
                rows.append(row)
                progress(row)
            return {
                "clock": "CPU time of one thread, before every call caches are emptied and another "
                "layer is computed",
                "rounds": "the half of the interleaved rounds in which products of matrices took "
                "least",
                "machine": {
                    "flop_per_s": {name: most[name].rate for name in map(_name, DTYPES)},
                    "bytes_per_s": most[READS].rate,
                },
                "switch_s": switch(),
                "rows": rows,
            }
    finally:
        torch.set_num_threads(threads)


class Limit(NamedTuple):
    """What does nothing but ``work``, operations or bytes read, and how much of it a second."""

    call: Call
    work: int
    rate: float


def limits() -> dict[str, Limit]:
    """The fastest that one thread was seen to do: products of square matrices of each dtype, and
    reading memory in products of a matrix and a vector, which read several rows at once. The
    matrix has a GiB, more than caches have, so this is main memory, or a cache shared with other
    machines."""
    data = torch.ones(2**15, 2**13)
    ways = {
        READS: [
            _limit(partial(torch.mv, data, torch.ones(2**13)), data.nbytes),
            _limit(partial(torch.mv, data.t(), torch.ones(2**15)), data.nbytes),
        ]
    }
    for dtype in DTYPES:
        found: list[Limit] = []
        for n in (768, 2048):
            if not found or found[0].work / found[0].rate < 0.05:  # else seconds for one
                a = torch.randn(n, n).to(dtype)
                found.append(_limit(partial(torch.mm, a, a), 2 * n**3))
        ways[_name(dtype)] = found
    return {kind: max(found, key=lambda limit: limit.rate) for kind, found in ways.items()}


def _limit(call: Call, work: int) -> Limit:
    return Limit(call, work, work / min(_times(call, 7)))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def switch(layers: int = 48, E: int = 128, B: int = 4, device: str = "cpu") -> float:
    """Seconds to write the widths of another budget into the tables of all layers; on a GPU, until
    it is done."""
    table_LBE = torch.randint(0, 1024, (layers, B, E), dtype=torch.int32, device=device)
    active = [torch.zeros(1, E, dtype=torch.int32, device=device) for _ in range(layers)]
    new = [row[None] for row in table_LBE[:, 1]]

    def write() -> None:
        for now, widths in zip(active, new, strict=True):
            now.copy_(widths)
        if device != "cpu":
            torch.cuda.synchronize()

    return median(_times(write, 21, time.thread_time if device == "cpu" else time.perf_counter))


def _rows(
    shape: Shape,
    dtype: torch.dtype,
    tokens: tuple[int, ...],
    repeats: int,
    most: dict[str, Limit],
) -> Iterator[dict[str, Any]]:
    E, K = shape.E, shape.K
    torch.manual_seed(0)
    layer, before = _layer(shape, dtype), _layer(shape._replace(E=K), dtype)
    width_BE = widths_of(shape)
    products = max(most["float32"], most[_name(dtype)], key=lambda limit: limit.rate)
    for T in tokens:
        x_TH = torch.randn(T, shape.H).to(dtype)
        weight_TK, index_TK = torch.rand(T, E).topk(K)
        weight_TK /= weight_TK.sum(1, keepdim=True)
        budget_T = ((torch.arange(T) + 1) % 3 * 2).int()
        few = min(T, PREVIOUS)
        routed = (x_TH[:few], torch.arange(K).repeat(few, 1), weight_TK[:few])
        previous = before(routed, width_BE[:, :K].contiguous(), budget_T[:few])
        calls = layer((x_TH, index_TK, weight_TK), width_BE, budget_T)
        at = {name: 0 * budget_T + b for b, name in enumerate(BUDGETS)} | {MIXED[0]: budget_T}
        # in the same rounds, as a machine whose host is shared is not always as fast
        calls |= {PRODUCTS: products.call, READS: most[READS].call}
        seconds = _interleaved(calls, repeats, previous)
        flop_per_s = products.work / seconds.pop(PRODUCTS)
        bytes_per_s = most[READS].work / seconds.pop(READS)
        works = {name: work(index_TK, width_BE[b.long()], shape.H, dtype) for name, b in at.items()}
        for of in works.values():
            of["roof_s"] = max(of["flop"] / flop_per_s, of["bytes"] / bytes_per_s)
        yield {
            "shape": shape._asdict(),
            "dtype": _name(dtype),
            "T": T,
            "seconds": seconds,
            "work": works,
            "machine": {"flop_per_s": flop_per_s, "bytes_per_s": bytes_per_s},
        }


def _layer(shape: Shape, dtype: torch.dtype) -> Callable[[Routed, Tensor, Tensor], dict[str, Call]]:
    """A layer of random weights: what computes it, by name, for tokens and widths."""
    stock = _stock(shape, dtype)
    weights, fused = _channel_major(stock), _vllm(stock)

    def calls(routed: Routed, width_BE: Tensor, budget_T: Tensor) -> dict[str, Call]:
        return {
            "transformers eager": _transformers(stock, "eager", *routed),
            "transformers grouped_mm": _transformers(stock, "grouped_mm", *routed),
            **({"vLLM cpu_fused_moe": fused(*routed)} if fused else {}),
            **{
                name: partial(experts, *routed, weights, width_BE, budget=b)
                for b, name in enumerate(BUDGETS)
            },
            MIXED[0]: partial(experts, *routed, weights, width_BE, budget_T),
            MIXED[1]: _apart(routed, weights, width_BE, budget_T),
        }

    return calls


def widths_of(shape: Shape) -> Tensor:
    """Widths of every budget, spread evenly around their mean, the same experts wide in each."""
    order = torch.randperm(shape.E)
    shares = [torch.linspace(a, b, shape.E)[order] for a, b in SPANS]
    return torch.stack([(share_E * shape.I).round() for share_E in shares]).int()


def work(index_TK: Tensor, width_TE: Tensor, H: int, dtype: torch.dtype) -> dict[str, float]:
    """Arithmetic of all pairs, and the weights that have to be read once."""
    width_TK = width_TE.gather(1, index_TK).long()
    widest_E = torch.zeros_like(width_TE[0]).long()
    widest_E.scatter_reduce_(0, index_TK.flatten(), width_TK.flatten(), "amax")
    return {
        "flop": 6 * H * int(width_TK.sum()),
        "bytes": 3 * H * int(widest_E.sum()) * dtype.itemsize,
    }


def _stock(shape: Shape, dtype: torch.dtype) -> Any:
    config = Qwen3MoeConfig(
        num_experts=shape.E,
        hidden_size=shape.H,
        moe_intermediate_size=shape.I,
        num_experts_per_tok=shape.K,
    )
    with torch.device("meta"):
        stock = Qwen3MoeExperts(config)
    stock = stock.to(dtype).to_empty(device="cpu")
    for parameter in stock.requires_grad_(False).parameters():
        parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return stock


def _transformers(stock: Any, name: str, *routed: Tensor) -> Call:
    def call() -> Tensor:
        stock.config._experts_implementation = name
        return stock(*routed)

    return call


def _channel_major(stock: Any) -> Weights:
    gate_up, down = stock.gate_up_proj, stock.down_proj
    E, H, I = down.shape
    return Weights(
        up=gate_up.view(E, 2, I, H).transpose(1, 2).reshape(E * I, 2, H),
        down=down.mT.reshape(E * I, H),
        offset_E=(torch.arange(E + 1) * I).int(),
        activate=gated("silu"),
        activation="silu",
    )


def _vllm(stock: Any) -> Callable[..., Call] | None:
    """vLLM's kernel for the CPU on the same weights, where vLLM is installed."""
    with suppress(ImportError):
        from vllm import _custom_ops as ops
        from vllm.platforms import current_platform

        current_platform.import_kernels()
        bfloat16 = stock.down_proj.dtype is torch.bfloat16
        isa = "amx" if bfloat16 and torch.cpu._init_amx() else "vec"  # as vLLM chooses
        packed = [ops.cpu_prepack_moe_weight(p.data, isa) for p in stock.parameters()]

        def prepared(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Call:
            rest = (*packed, None, None, weight_TK, index_TK.int(), "silu", isa)

            def call() -> Tensor:  # an output of its own, as in vLLM's layer and in all others
                out_TH = torch.empty_like(x_TH)
                ops.cpu_fused_moe(out_TH, x_TH, *rest)
                return out_TH

            return call

        return prepared
    return None


def _apart(routed: Routed, weights: Weights, width_BE: Tensor, budget_T: Tensor) -> Call:
    """The tokens of each budget in a batch of their own."""
    x_TH, index_TK, weight_TK = routed
    batches = []
    for b in budget_T.unique().tolist():
        own = budget_T == b
        batch = (x_TH[own], index_TK[own], weight_TK[own])
        batches.append(partial(experts, *batch, weights, width_BE, budget=b))
    return lambda: [call() for call in batches]


def _interleaved(
    calls: dict[str, Call], repeats: int, previous: dict[str, Call]
) -> dict[str, float]:
    """Median of each call over the half of the rounds in which `PRODUCTS` took least; what is slow
    is measured once, the first time. ``previous`` are called before, by the same names."""
    before = {name: previous.get(name, lambda: None) for name in calls}
    first = {name: _times(call, 1, before=before[name])[0] for name, call in calls.items()}
    rounds = [
        {
            name: _times(call, 1, before=before[name])[0]
            for name, call in calls.items()
            if first[name] <= SLOW_S or name == PRODUCTS
        }
        for _ in range(repeats)
    ]
    fastest = sorted(rounds, key=lambda times: times[PRODUCTS])[: (repeats + 1) // 2]
    return first | {name: median(times[name] for times in fastest) for name in fastest[0]}


def _times(
    call: Call,
    repeats: int,
    clock: Callable[[], float] = time.thread_time,
    before: Call = lambda: None,
) -> list[float]:
    other, times = _other(), []
    for _ in range(repeats):
        other.sum()
        before()
        start = clock()
        call()
        times.append(clock() - start)
    return times


@cache
def _other() -> Tensor:
    """Memory that fills the caches when it is read."""
    return torch.ones(LARGER_THAN_CACHES // 4)
