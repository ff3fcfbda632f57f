"""Back end of compiled C++ for the CPU: experts that few tokens go through, as in decoding.

Experts of many tokens are left to the matrix products of torch where those are faster. The source
is compiled at first use, in seconds, into the user's cache folder.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import struct
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.kernels import torch_loop
from flexmoe.kernels.activations import ACTIVATIONS

if TYPE_CHECKING:
    from flexmoe.kernels.interface import Weights

HEADERS = ("amx", "blocks", "layer", "panels", "tiles", "vectors")
FILES = ("cpu.cpp", *(f"cpu_{name}.h" for name in HEADERS))
SOURCES = tuple(Path(__file__).with_name(name) for name in FILES)
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp")
TARGETS = {  # by what torch calls the instruction set
    # Without masks compilers make vectors of activations only if told that comparisons never trap
    "AVX2": ("-mavx2", "-mfma", "-fno-trapping-math"),
    "AVX512": ("-march=x86-64-v4", "-mavx512bf16"),
    "AMX": ("-march=x86-64-v4", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"),
}
# Tokens of an expert at a budget from which torch is faster in float32, by what torch runs on,
# measured on an AMD EPYC and an Intel Xeon. In bfloat16 never: torch puts weights in its own order
# first, and has no fast product at all with AVX2. Nor where experts are small.
MANY = {"AVX2": 128, "AVX512": 64}
SMALL = 1 << 18  # values of gate and up of an expert; torch lost with 2**14
DTYPES = (torch.float32, torch.bfloat16)

log = logging.getLogger(__name__)


# The struct `Call` of the source: eight pointers, eight numbers. Little is done in Python in a
# call, for caches full of weights have nothing of it.
CALL = struct.Struct("8P8i")


class _Cut(NamedTuple):
    """Experts, and the widths to which tokens cut them: arguments of `experts`."""

    weights: Weights
    width_BE: Tensor
    token_budget_T: Tensor | None
    budget: int


class _Stored(ctypes.Structure):
    """The struct `Stored` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in "up down offset".split()),
        *((name, ctypes.c_int64 * 3) for name in "up_by bias_by down_by".split()),
        *((name, ctypes.c_int32) for name in "I sides activation weights_bf16".split()),
    )


def can_run(weights: Weights, x_TH: Tensor) -> str | None:
    """None, or the reason why `experts` cannot be computed here."""
    tensors = weights.tensors
    if any(tensor.device.type != "cpu" for tensor in (x_TH, *tensors)):
        return f"tensors are on '{weights.up.device}', not on the CPU"
    if weights.up.dtype not in DTYPES or len({tensor.dtype for tensor in tensors}) > 1:
        return f"weights are {weights.up.dtype}, not all float32 or all bfloat16"
    if weights.up_scale is not None or weights.down_scale is not None:
        return "weights have scales"
    if x_TH.dtype not in DTYPES:
        return f"tokens are {x_TH.dtype}, not float32 or bfloat16"
    if weights.activation not in ACTIVATIONS:
        return f"activation '{weights.activation}' is not one of {', '.join(ACTIVATIONS)}"
    if weights.up.stride(-1) != 1 or 1 not in weights.down.stride()[-2:]:
        return "gate and up of a channel are not rows, or down is neither by channel nor by column"
    return _library()[1] or None


def experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    weights: Weights,
    width_BE: Tensor,
    token_budget_T: Tensor | None = None,
    budget: int = 0,
) -> Tensor:
    """See `flexmoe.kernels.interface.experts`. Sums are float32."""
    cut = _Cut(weights, width_BE, token_budget_T, budget)
    many_TK = _many_TK(index_TK, cut)
    if many_TK is None:
        return _compiled(x_TH, index_TK, weight_TK, cut)
    out_TH = _compiled(x_TH.float(), index_TK.masked_fill(many_TK, -1), weight_TK, cut)
    _add_products(out_TH, x_TH, index_TK.where(many_TK, -1), weight_TK, cut)
    return out_TH.to(x_TH.dtype)


def _many_TK(index_TK: Tensor, cut: _Cut) -> Tensor | None:
    """The pairs of experts of so many tokens that torch is faster, or None if there are none.

    Tokens of an expert at other budgets are another product. A budget that is not in the table is
    left to the source, which says so."""
    weights, width_BE, token_budget_T, budget = cut
    if weights.up.dtype is not torch.float32 or index_TK.numel() < (many := _many()):
        return None
    T, (B, E) = len(index_TK), width_BE.shape
    if weights.up.numel() < SMALL * E:
        return None
    budget_TK = torch.full_like(index_TK, budget)
    if token_budget_T is not None:
        budget_TK = token_budget_T[:T, None].expand_as(index_TK)
    known_TK = (index_TK >= 0) & (index_TK < E) & (budget_TK >= 0) & (budget_TK < B)
    key_TK = (index_TK.long() + E * budget_TK.long()).where(known_TK, E * B)
    many_TK = (torch.bincount(key_TK.flatten())[key_TK] >= many) & known_TK
    return many_TK if many_TK.any() else None


def _add_products(
    out_TH: Tensor, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, cut: _Cut
) -> None:
    """Add what `experts` gives to the outputs in float32, by torch's products, one expert after
    the other: all at once they take memory that is new in every call, and costs more than they."""
    weights = cut.weights
    routing, table = torch_loop.sort(index_TK, weight_TK.float(), *cut[1:])
    prefix, bias_EH = torch_loop.prefixes(weights), weights.down_bias_EH
    for (e, start, stop), b in zip(routing.segments, routing.budgets, strict=True):
        up, bias, down_wH = prefix(e, max(0, table[b][e]))
        token_n = routing.token_S[start:stop]
        x_nH = x_TH[token_n].to(down_wH.dtype)
        y_nH = torch_loop.activations(x_nH, up, bias, weights.activate) @ down_wH
        y_nH = y_nH if bias_EH is None else y_nH + bias_EH[e]
        out_TH.index_add_(0, token_n, y_nH * routing.weight_S[start:stop, None])


def _compiled(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, cut: _Cut) -> Tensor:
    library, reason = _library()
    if library is None:
        raise FlexmoeError(f"the kernel 'cpu' cannot run: {reason}")
    weights, width_BE, token_budget_T, budget = cut
    (T, H), (B, E) = x_TH.shape, width_BE.shape
    x_TH, index_TK = _as(x_TH, x_TH.dtype), _as(index_TK, torch.int64)
    out_TH = torch.empty_like(x_TH)
    weight_TK, width_BE = _as(weight_TK, torch.float32), _as(width_BE, torch.int32)
    up_bias, bias_EH = weights.up_bias, weights.down_bias_EH
    if bias_EH is not None:
        bias_EH = _as(bias_EH, weights.up.dtype)
    if token_budget_T is not None:
        token_budget_T = _as(token_budget_T[:T], torch.int32)
    call = CALL.pack(
        0 if up_bias is None else up_bias.data_ptr(),
        0 if bias_EH is None else bias_EH.data_ptr(),
        x_TH.data_ptr(),
        index_TK.data_ptr(),
        weight_TK.data_ptr(),
        width_BE.data_ptr(),
        0 if token_budget_T is None else token_budget_T.data_ptr(),
        out_TH.data_ptr(),
        *(T, index_TK.shape[1], E, B, H, budget),
        x_TH.dtype is torch.bfloat16,
        torch.get_num_threads(),
    )
    if problem := library.flexmoe_experts(_stored(weights), call):
        raise FlexmoeError(f"the kernel 'cpu': {problem.decode()}")
    return out_TH


def _stored(weights: Weights) -> Any:
    """A pointer to what the source has to know of the weights, made anew when they move."""
    up, down = weights.up.data_ptr(), weights.down.data_ptr()
    offset_E, bias = weights.offset_E, weights.up_bias
    made = weights.known.get("cpu")
    if made is None or made[0] is not offset_E or made[1] != (up, down):
        given = offset_E
        if offset_E is not None:
            offset_E = _as(offset_E, torch.int32)
        stored = _Stored(
            up=up,
            down=down,
            offset=0 if offset_E is None else offset_E.data_ptr(),
            up_by=_strides(weights.up, weights)[:3],
            bias_by=(0, 0, 0) if bias is None else _strides(bias, weights),
            down_by=_strides(weights.down, weights),
            I=0 if offset_E is not None else weights.up.shape[1],
            sides=weights.up.shape[-2],
            activation=list(ACTIVATIONS).index(weights.activation),
            weights_bf16=weights.up.dtype is torch.bfloat16,
        )
        made = weights.known["cpu"] = (given, (up, down), ctypes.byref(stored), offset_E)
    return made[2]


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor, contiguous."""
    if tensor.dtype is dtype and tensor.is_contiguous():
        return tensor
    return tensor.to(dtype).contiguous()


def _strides(tensor: Tensor, weights: Weights) -> tuple[int, ...]:
    """The struct `Strides` of the source, and what comes after it."""
    return (0, *tensor.stride()) if weights.offset_E is not None else tensor.stride()


@cache
def _library() -> tuple[ctypes.CDLL | None, str]:
    """The compiled source, or the reason why there is none, logged once."""
    try:
        library = ctypes.CDLL(str(build(_target())))
    except (OSError, FlexmoeError) as error:
        log.warning("no compiled kernel for the CPU, torch is used: %s", error)
        return None, str(error)
    library.flexmoe_experts.restype = ctypes.c_char_p
    return library, ""


@cache
def _many() -> int:
    return MANY[torch.backends.cpu.get_cpu_capability()]


@cache
def _target() -> str:
    """Of `TARGETS` the best that runs here."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability == "AVX512" and torch.cpu._is_avx512_bf16_supported():
        # Linux gives a process tiles when it asks for them, which this does
        return "AMX" if torch.cpu._init_amx() else "AVX512"
    if capability in ("AVX2", "AVX512"):
        return "AVX2"
    raise FlexmoeError(f"it is written for AVX2 and AVX512, the processor has '{capability}'")


def build(target: str) -> Path:
    """Compile the source for one of `TARGETS`, unless that was done before. Processes that build
    at the same time do not meet: each writes a file of its own and renames it in the end."""
    command = [os.environ.get("CXX", "g++"), *FLAGS, *TARGETS[target]]
    content = b"".join(source.read_bytes() for source in SOURCES)
    key = hashlib.sha256(content + repr(command).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flexmoe"
    path = folder / f"cpu-{target.lower()}-{key}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as beside:
        made = Path(beside) / path.name
        run = subprocess.run([*command, "-o", made, SOURCES[0]], capture_output=True, text=True)
        if run.returncode:
            raise FlexmoeError(f"{command[0]} failed: {run.stderr.strip()[:500]}")
        made.replace(path)
    return path
