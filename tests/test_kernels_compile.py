"""The Triton kernels compile for GPUs, which needs none: the interpreter takes code that the
compiler refuses. What they load and multiply with is read off the assembly."""

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from test_kernels import make, route, stock, tokens

pytest.importorskip("triton")
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.tools.tensor_descriptor import TensorDescriptor

from flexmoe.kernels import triton_device, triton_gpu, triton_pairs

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.int32: "i32",
    torch.int64: "i64",
}
HOPPER, AMPERE = 90, 80
MANY = 200  # tokens: blocks are of 128 pairs then


class Recorder:
    """Takes the place of a kernel and keeps what it is launched with."""

    def __init__(self, kernel, launched):
        self.kernel, self.launched = kernel, launched

    def __getitem__(self, grid):
        return lambda *args, **named: self.launched.append((self.kernel, args, named))


@pytest.fixture
def launched(monkeypatch):
    found = []
    for module, names in (
        (triton_device, ("gate_up", "down", "combine")),
        (triton_pairs, ("count", "place", "gather")),
    ):
        for name in names:
            monkeypatch.setattr(module, name, Recorder(getattr(module, name), found))
    return found


def type_of(value):
    """How a value is passed: its type, or None where it is compiled in."""
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{TYPES[value.base.dtype]}{list(value.block_shape)}>"
    if isinstance(value, torch.Tensor):
        return f"*{TYPES[value.dtype]}"
    return None if value is None or value == 1 else "i32"


def assembly(kernel, args, named, capability):
    """PTX of a kernel as it would be launched, with the first tiles worth trying."""
    options = {name: named.pop(name) for name in ("num_warps", "num_stages") if name in named}
    if isinstance(kernel, Autotuner):
        given = dict(zip(kernel.arg_names, args, strict=False))
        tiles = kernel.early_config_prune(None, given, **named)[0]
        options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
        named, kernel = named | tiles.kwargs, kernel.fn
    given = dict(zip(kernel.arg_names, args, strict=False))
    types = {name: type_of(value) for name, value in given.items()}
    signature = {name: types.get(name) or "constexpr" for name in kernel.arg_names}
    constants = {n: v for n, v in (given | named).items() if signature[n] == "constexpr"}
    even = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if signature[name].startswith("*")
        or (signature[name] == "i32" and given[name] % 16 == 0 and name not in ("S", "N"))
    }
    source = ASTSource(kernel, signature, constants, even)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm[
        "ptx"
    ]


def compiled(launched, capability, *call):
    triton_gpu.experts(*call)
    found = {
        getattr(kernel, "base_fn", kernel).__name__: assembly(kernel, args, named, capability)
        for kernel, args, named in launched
    }
    launched.clear()
    return found


def in_vectors(ptx):
    sizes = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", ptx)
    return bool(sizes) and {int(size, 0) for size in sizes} <= {8, 16}  # 8: a small tile


@pytest.mark.parametrize("capability", [AMPERE, HOPPER])
@pytest.mark.parametrize("mixed", [False, True])
def test_few_pairs_come_many_values_at_a_time(launched, capability, mixed):
    weights = make([256] * 4, 256, torch.bfloat16)
    for T in (1, 9):
        routed = (tokens(T, 256, torch.bfloat16), *route(T, 4, 2, torch.bfloat16))
        how = (torch.full((2, 4), 200).int(), torch.arange(T) % 2 if mixed else None)
        found = compiled(launched, capability, *routed, weights, *how)
        for name in ("gate_up", "down"):
            assert in_vectors(found[name]) and "mma.sync" in found[name]


def test_many_pairs_come_by_descriptors_on_hopper_alone(launched, monkeypatch):
    weights = make([256] * 4, 256, torch.bfloat16)
    routed = (tokens(MANY, 256, torch.bfloat16), *route(MANY, 4, 2, torch.bfloat16))
    how = (torch.full((2, 4), 200).int(), torch.arange(MANY) % 2)
    found = compiled(launched, HOPPER, *routed, weights, *how)
    assert "gather" in found
    for name in ("gate_up", "down"):
        assert "cp.async.bulk.tensor" in found[name] and "wgmma.mma_async" in found[name]
    # as families lie in transformers, a channel is a column of down
    found = compiled(launched, HOPPER, *routed, stock(weights), *how)
    assert "cp.async.bulk.tensor" in found["gate_up"]
    assert in_vectors(found["down"]) and "wgmma.mma_async" in found["down"]
    monkeypatch.setattr(triton_gpu, "_roomy", lambda device: False)
    found = compiled(launched, AMPERE, *routed, weights, *how)
    for name in ("gate_up", "down"):
        assert in_vectors(found[name]) and "mma.sync" in found[name]


def test_other_dtypes_biases_and_experts_without_a_gate(launched):
    for dtype in (torch.float32, torch.float16):
        weights = make([64] * 4, 64, dtype, gate=False, bias=True)
        routed = (tokens(9, 64, dtype), *route(9, 4, 2, dtype))
        found = compiled(launched, HOPPER, *routed, weights, torch.full((1, 4), 33).int())
        assert {"count", "place", "gate_up", "down", "combine"} == set(found)
        for name in ("gate_up", "down"):  # float32 stays float32
            assert ("mma.sync" in found[name]) == (dtype is torch.float16)
    exact = make([64] * 4, 64)
    float8 = {"up": exact.up.to(torch.float8_e4m3fn), "down": exact.down.to(torch.float8_e4m3fn)}
    scaled = replace(exact, **float8, up_scale=torch.ones(256, 2), down_scale=torch.ones(256))
    routed = (tokens(9, 64, torch.bfloat16), *route(9, 4, 2, torch.bfloat16))
    found = compiled(launched, HOPPER, *routed, scaled, torch.full((1, 4), 33).int())
    assert "mma.sync" in found["gate_up"] and "mma.sync" in found["down"]


def test_tiles_are_tuned_for_every_kind_of_gpu(launched, monkeypatch):
    """Of two in a machine, one may not have the memory that the tiles of the other take."""
    weights, tried = make([64] * 4, 64, torch.bfloat16), []
    routed = (tokens(9, 64, torch.bfloat16), *route(9, 4, 2, torch.bfloat16))
    for kind in ("A", "B", "A"):
        monkeypatch.setattr(triton_gpu, "_kind", lambda device, kind=kind: kind)
        triton_gpu.experts(*routed, weights, torch.full((1, 4), 33).int())
    kernels = [(kernel, a, named) for kernel, a, named in launched if isinstance(kernel, Autotuner)]
    assert len(kernels) == 6
    for kernel, args, named in kernels:
        if kernel.cache_results:  # not seen yet
            monkeypatch.setattr(kernel, "cache_results", False)
            monkeypatch.setattr(kernel, "cache", {})
            monkeypatch.setattr(kernel, "fn", SimpleNamespace(run=lambda *a, **k: None))
            monkeypatch.setattr(kernel, "_bench", lambda *a, config, **k: [len(tried)])
        before = len(kernel.cache)
        kernel.run(*args, **named)
        tried.append(len(kernel.cache) - before)
    assert tried == [1, 1, 1, 1, 0, 0]
