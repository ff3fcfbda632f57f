"""Back end in Triton, for GPUs: two grouped GEMMs over blocks of pairs of one expert and budget.

Every launch has a shape that follows from the shapes of the arguments alone and nothing is read
back to the host, so a captured CUDA graph stays right when widths, budgets of tokens or routing
change in place. The first call of a shape tunes and must come before the capture.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flexmoe.kernels.activations import ACTIVATIONS

if TYPE_CHECKING:
    from flexmoe.kernels.interface import Weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SCALED = torch.float8_e4m3fn  # multiplied in the dtype of the tokens

# offset_E -> (its version, channels of the largest expert)
_largest: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def can_run(weights: Weights, x_TH: Tensor) -> str | None:
    """None, or why the kernel cannot run."""
    if not x_TH.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"tensors are on {x_TH.device}, it needs a GPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if weights.activation not in ACTIVATIONS:
        return f"activation '{weights.activation}' is not one of {', '.join(ACTIVATIONS)}"
    if weights.up.dtype not in (*DTYPES, SCALED) or weights.down.dtype != weights.up.dtype:
        return f"weights are {weights.up.dtype}, it has float32, bfloat16, float16, float8_e4m3fn"
    scaled = [scale is not None for scale in (weights.up_scale, weights.down_scale)]
    if any(found != (weights.up.dtype == SCALED) for found in scaled):
        return f"weights are {weights.up.dtype}: float8_e4m3fn has scales, others have none"
    tensors = [*weights.tensors, weights.offset_E]
    if any(t is not None and t.device != x_TH.device for t in tensors):
        return f"weights are not all on {x_TH.device}, where the tokens are"
    return None


def experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    weights: Weights,
    width_BE: Tensor,
    token_budget_T: Tensor | None = None,
    budget: int = 0,
) -> Tensor:
    """See `flexmoe.kernels.interface.experts`. All tensors on the device of ``x_TH``; ``budget``
    is a number of the host, so a captured graph keeps it."""
    from flexmoe.kernels import triton_device as device

    T, K = index_TK.shape
    C, H = weights.up.shape[-2:]
    out_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    if T * K == 0:
        return out_TH.zero_()
    E = width_BE.shape[1]
    if token_budget_T is None:
        width_BE = width_BE[budget : budget + 1]
    else:
        token_budget_T = token_budget_T[:T]
    width_BE = width_BE.contiguous()
    B = width_BE.shape[0]
    block = _block(T * K / (E * B))
    blocks = Blocks.of(index_TK, E, token_budget_T, B, block)
    offset_E = weights.offset_E
    table = (*blocks, offset_E, width_BE, E, B)
    N = blocks.group_N.shape[0]

    widest = max(1, weights.up.shape[1] if offset_E is None else largest(offset_E))
    bias, bias_EH = weights.up_bias, weights.down_bias_EH
    scale, down_scale = weights.up_scale, weights.down_scale
    dtype = x_TH.dtype if weights.down.dtype == SCALED else weights.down.dtype
    h_SI = x_TH.new_empty(T * K, widest, dtype=dtype)
    device.gate_up[lambda tile: (N, -(-widest // tile["BLOCK_N"]))](
        x_TH.to(dtype).contiguous(),
        weights.up,
        *_strides(weights.up, offset_E),
        bias,
        *((0, 0, 0) if bias is None else _strides(bias, offset_E)),
        scale,
        *((0, 0, 0) if scale is None else _strides(scale, offset_E)),
        down_scale,
        *((0, 0) if down_scale is None else _strides(down_scale, offset_E)),
        h_SI,
        *table,
        K,
        widest,
        H=H,
        C=C,
        RAGGED=offset_E is not None,
        ACTIVATION=weights.activation,
        SCALED=scale is not None,
        BIAS=bias is not None,
        BLOCK_M=block,
    )
    y_SH = x_TH.new_empty(T * K, H, dtype=torch.float32)
    device.down[lambda tile: (N, -(-H // tile["BLOCK_N"]))](
        h_SI,
        weights.down,
        *_strides(weights.down, offset_E),
        None if bias_EH is None else bias_EH.contiguous(),
        weight_TK.contiguous(),
        y_SH,
        *table,
        widest,
        H=H,
        C=C,
        RAGGED=offset_E is not None,
        BIAS=bias_EH is not None,
        BLOCK_M=block,
    )
    columns = 1024
    device.combine[(T, -(-H // columns))](
        y_SH, index_TK.contiguous(), out_TH, E, K, H=H, BLOCK=columns
    )
    return out_TH


def _strides(tensor: Tensor, offset_E: Tensor | None) -> tuple[int, ...]:
    """Between values of two experts (ragged: not used), two channels, and on."""
    return tensor.stride() if offset_E is None else (0, *tensor.stride())


class Blocks(NamedTuple):
    """Pairs sorted by (expert, budget) and cut into blocks of one such group each.

    ``position_S`` is the place t * K + k of each sorted pair; block n holds the sorted pairs
    ``start_N[n]`` to ``stop_N[n]`` of group ``group_N[n]`` = expert * B + budget. N is the most
    there can be of them; those too many are empty.
    """

    position_S: Tensor
    group_N: Tensor
    start_N: Tensor
    stop_N: Tensor

    @classmethod
    def of(
        cls, index_TK: Tensor, E: int, token_budget_T: Tensor | None, B: int, size: int
    ) -> Blocks:
        """Made on the device by operations of fixed size."""
        S, G = index_TK.numel(), E * B
        key_TK = index_TK.long() * B
        if token_budget_T is not None:
            key_TK = key_TK + token_budget_T[:, None]
        elsewhere = (index_TK < 0) | (index_TK >= E)
        key_S, position_S = key_TK.masked_fill(elsewhere, G).view(-1).sort(stable=True)
        first_G1 = torch.searchsorted(key_S, torch.arange(G + 1, device=key_S.device))
        blocks_G = (first_G1.diff() + (size - 1)) // size
        end_G = blocks_G.cumsum(0)
        filled = min(S, G)  # groups that are not empty, at most
        n_N = torch.arange(filled + (S - filled) // size, device=key_S.device)
        group_N = torch.searchsorted(end_G, n_N, right=True)
        valid_N = group_N < G
        group_N = group_N.clamp_max(G - 1)
        start_N = first_G1[group_N] + (n_N - (end_G - blocks_G)[group_N]) * size
        stop_N = torch.minimum(start_N + size, first_G1[group_N + 1])
        stop_N = torch.where(valid_N, stop_N, start_N)
        return cls(position_S, group_N, start_N, stop_N)


def largest(offset_E: Tensor) -> int:
    """Channels of the largest stored expert. Read from the device once for every content of
    ``offset_E``, as far as its version tells."""
    version = 0 if offset_E.is_inference() else offset_E._version
    known = _largest.get(offset_E)
    if known is None or known[0] != version:
        known = _largest[offset_E] = version, int(offset_E.diff().max())
    return known[1]


def _block(pairs: float) -> int:
    """Pairs in a block: the power of two above the mean of a group, 16 (the smallest matrix
    instruction) to 128."""
    size = 16
    while size < min(pairs, 128):
        size *= 2
    return size
