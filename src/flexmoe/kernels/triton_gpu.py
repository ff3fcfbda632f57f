"""Back end in Triton, for GPUs: two grouped GEMMs over blocks of pairs of one expert.

Every launch has a shape that follows from the shapes of the arguments alone and nothing is read
back to the host, so a captured CUDA graph stays right when widths, budgets of tokens or routing
change in place. The first call of a shape tunes and must come before the capture.
"""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from flexmoe.kernels.activations import ACTIVATIONS

if TYPE_CHECKING:
    from flexmoe.kernels.interface import Weights
    from flexmoe.kernels.triton_pairs import Blocks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALLEST, LARGEST = 16, 128  # pairs of a block; no matrix instruction takes fewer
SCALED = torch.float8_e4m3fn  # multiplied in the dtype of the tokens

# offset_E -> (its version, channels of the largest expert)
_largest: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def can_run(weights: Weights, x_TH: Tensor) -> str | None:
    """None, or why the kernel cannot run."""
    if weights.up.dtype == SCALED and x_TH.is_cuda and not _has_float8(x_TH.device):
        return "weights are float8_e4m3fn, which the GPU does not have"
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

    (T, K), E, H = index_TK.shape, width_BE.shape[1], x_TH.shape[1]
    out_TH = torch.empty_like(x_TH, memory_format=torch.contiguous_format)
    if T * K == 0:
        return out_TH.zero_()
    index_TK, columns = index_TK.contiguous(), 1024
    with torch.cuda.device_of(x_TH):  # Triton launches on the current device
        pairs = Pairs.of(index_TK, width_BE, token_budget_T, budget)
        h_SI = _activations(x_TH, weights, pairs)
        y_ZSH = _outputs(h_SI, weight_TK, weights, pairs, out_TH)
        device.combine[(T, -(-H // columns))](
            y_ZSH, index_TK, out_TH, T * K, E, H=H, K=K, SPLIT=len(y_ZSH), BLOCK=columns
        )
    return out_TH


class Pairs(NamedTuple):
    """S routed pairs in N blocks of up to ``block``, and widths."""

    S: int
    E: int
    K: int
    block: int
    blocks: Blocks
    width_BE: Tensor
    token_budget_T: Tensor | None

    @property
    def N(self) -> int:
        return self.blocks.expert_N.numel()

    @classmethod
    def of(
        cls, index_TK: Tensor, width_BE: Tensor, token_budget_T: Tensor | None, budget: int
    ) -> Pairs:
        from flexmoe.kernels.triton_pairs import Blocks, sort

        (T, K), (B, E) = index_TK.shape, width_BE.shape
        if token_budget_T is None:
            width_BE = width_BE[budget : budget + 1]
        else:
            token_budget_T = token_budget_T[:T].contiguous()
        widths = width_BE.contiguous(), token_budget_T
        if T == 1:  # every pair is a block as it is
            return cls(K, E, K, SMALLEST, Blocks(None, index_TK, None, None), *widths)
        block = _block(T * K / E)
        blocks = sort(index_TK, E, token_budget_T, B, block)
        return cls(T * K, E, K, block, blocks, *widths)

    def told(self, offset_E: Tensor | None) -> tuple[Any, ...]:
        """What kernels look up."""
        widths = (offset_E, self.width_BE, self.token_budget_T)
        return (*self.blocks, *widths, self.N, self.E, self.K)

    @property
    def constants(self) -> dict[str, Any]:
        """What is compiled in."""
        return {
            "MIXED": self.token_budget_T is not None,
            "ALONE": self.blocks.position_S is None,
            "BLOCK_M": self.block,
            "GPU": _kind(self.width_BE.device),
        }


def _activations(x_TH: Tensor, weights: Weights, pairs: Pairs) -> Tensor:
    """Of sorted pairs [S, I], I being the channels of the largest expert, padded."""
    from flexmoe.kernels import triton_device as device
    from flexmoe.kernels import triton_tiles as tiles
    from flexmoe.kernels.triton_pairs import sorted_tokens

    up, bias, offset_E = weights.up, weights.up_bias, weights.offset_E
    scale, down_scale = weights.up_scale, weights.down_scale
    x_TH = x_TH.to(x_TH.dtype if scale is not None else up.dtype).contiguous()
    padded = -(-max(1, _widest(weights)) // tiles.PAD) * tiles.PAD
    # times the scale of down, which can be beneath what float16 holds
    small = scale is not None and x_TH.dtype is torch.float16
    h_SI = x_TH.new_empty(pairs.S, padded, dtype=torch.bfloat16 if small else x_TH.dtype)
    by = _strides(up, offset_E)
    x_rows = up_rows = None
    if pairs.block == LARGEST and _by_rows(up, by):
        assert pairs.blocks.position_S is not None
        x_SH = sorted_tokens(x_TH, pairs.blocks.position_S, pairs.K)
        x_rows = _rows(x_SH, x_SH.shape[1], LARGEST, tiles.DEPTH)
        up_rows = _rows(up, by[1], tiles.UP_COLUMNS, tiles.DEPTH)
    device.gate_up[lambda tile: (pairs.N * -(-padded // tile["BLOCK_N"]),)](
        x_TH,
        x_rows,
        up,
        up_rows,
        *by,
        bias,
        *((0, 0, 0) if bias is None else _strides(bias, offset_E)),
        scale,
        *((0, 0, 0) if scale is None else _strides(scale, offset_E)),
        down_scale,
        *((0, 0) if down_scale is None else _strides(down_scale, offset_E)),
        h_SI,
        *pairs.told(offset_E),
        padded,
        H=x_TH.shape[1],
        C=up.shape[-2],
        RAGGED=offset_E is not None,
        ACTIVATION=weights.activation,
        SCALED=scale is not None,
        BIAS=bias is not None,
        PAD=tiles.PAD,
        ROWS=up_rows is not None,
        **pairs.constants,
    )
    return h_SI


def _outputs(
    h_SI: Tensor, weight_TK: Tensor, weights: Weights, pairs: Pairs, like_TH: Tensor
) -> Tensor:
    """Weighted, of pairs at their places [t * K + k], in Z parts to add up [Z, S, H]."""
    from flexmoe.kernels import triton_device as device
    from flexmoe.kernels import triton_tiles as tiles

    down, bias_EH, offset_E = weights.down, weights.down_bias_EH, weights.offset_E
    (S, padded), H = h_SI.shape, like_TH.shape[1]
    by = _strides(down, offset_E)
    h_rows = down_rows = None
    if pairs.block == LARGEST and _by_rows(down, by):
        h_rows = _rows(h_SI, padded, LARGEST, tiles.DEPTH)
        down_rows = _rows(down, by[1], tiles.DEPTH, tiles.DOWN_COLUMNS)
    split = _split(min(S, pairs.E), H) if pairs.block == SMALLEST else 1
    dtype = torch.float32 if pairs.block < 64 else like_TH.dtype  # few are no load for the memory
    y_ZSH = like_TH.new_empty(split, S, H, dtype=dtype)
    columns_of_stock = offset_E is None and by[1] == 1 and _widest(weights) % 8 == 0
    device.down[lambda tile: (pairs.N * -(-H // tile["BLOCK_N"]), split)](
        h_SI,
        h_rows,
        down,
        down_rows,
        *by,
        None if bias_EH is None else bias_EH.contiguous(),
        weight_TK.contiguous(),
        y_ZSH,
        *pairs.told(offset_E),
        padded,
        S,
        H=H,
        C=weights.up.shape[-2],
        RAGGED=offset_E is not None,
        BIAS=bias_EH is not None,
        PAD=tiles.PAD,
        ROUND=8 if columns_of_stock else 1,
        SPLIT=split,
        ROWS=down_rows is not None,
        **pairs.constants,
    )
    return y_ZSH


def _by_rows(tensor: Tensor, by: tuple[int, ...]) -> bool:
    """Whether a side of a channel is a row of H, all channels one after the other, as descriptors
    take them."""
    if tensor.dtype not in (torch.bfloat16, torch.float16) or not _roomy(tensor.device):
        return False
    H, by_c = tensor.shape[-1], by[1]
    rows = by[-1] == 1 and H % 64 == 0 and all(stride % H == 0 for stride in by[:-1])
    dense = by_c in (H, tensor.shape[-2] * H if len(by) == 4 else H) and by[0] % by_c == 0
    return rows and dense and tensor.data_ptr() % 16 == 0 and tensor.numel() > 0


@cache
def _kind(device: torch.device) -> str:
    """Of GPU: what tiles are tuned for."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@cache
def _has_float8(device: torch.device) -> bool:
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 9)


@cache
def _roomy(device: torch.device) -> bool:
    """Hopper or later, with the shared memory that the tiles need; or Triton's interpreter."""
    if device.type == "cpu":
        return True
    properties = torch.cuda.get_device_properties(device)
    hopper = torch.version.hip is None and properties.major >= 9
    return hopper and properties.shared_memory_per_block_optin >= 200 * 1024


def _rows(tensor: Tensor, length: int, *tile: int) -> Any:
    """A descriptor of the memory of a tensor as rows, of which tiles can be fetched."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    last = sum((n - 1) * by for n, by in zip(tensor.shape, tensor.stride(), strict=True))
    return TensorDescriptor(tensor, [last // length + 1, length], [length, 1], [*tile])


def _strides(tensor: Tensor, offset_E: Tensor | None) -> tuple[int, ...]:
    """Between values of two experts (ragged: not used), two channels, and on."""
    return tensor.stride() if offset_E is None else (0, *tensor.stride())


def _widest(weights: Weights) -> int:
    """Channels of the largest stored expert."""
    full = weights.offset_E is None
    return weights.up.shape[1] if full else largest(weights.offset_E)


def largest(offset_E: Tensor) -> int:
    """The most channels between two offsets. Read from the device once for every content of
    ``offset_E``, as far as its version tells."""
    version = 0 if offset_E.is_inference() else offset_E._version
    known = _largest.get(offset_E)
    if known is None or known[0] != version:
        known = _largest[offset_E] = version, int(offset_E.diff().max())
    return known[1]


def _block(pairs: float) -> int:
    """Pairs in a block: the power of two from twice the mean of an expert on, within limits. Most
    experts are one block then, which reads their weights once."""
    size = SMALLEST
    while size < min(2 * pairs, LARGEST):
        size *= 2
    return size


def _split(blocks: int, H: int) -> int:
    """Parts of the sum over channels, so that few blocks keep a whole GPU busy: some hundred
    programs of 256 columns."""
    parts = 1
    while parts < 8 and parts * blocks * H < 96 * 256:
        parts *= 2
    return parts
