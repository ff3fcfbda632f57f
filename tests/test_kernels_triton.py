"""The Triton kernels in Triton's interpreter, against the naive loop; on a GPU, in a CUDA graph."""

from __future__ import annotations

import importlib

import pytest
import torch

from flexmoe.kernels import Weights, experts, torch_loop
from test_kernels import make, naive, route, tokens

pytest.importorskip("triton")

# float32: sums in another order. float16: activations are rounded between the products. bfloat16
# cannot be interpreted: Triton 3.9's interpreter multiplies its bits as integers in a dot.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def code():
    """The kernels' module, interpreted: Triton asks the environment when a kernel is defined."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from flexmoe.kernels import triton_code

        yield importlib.reload(triton_code)
    if torch.cuda.is_available():
        importlib.reload(triton_code)


def check(
    code, weights: Weights, width_BE, T: int, K: int = 2, budgets: bool = True, **more
) -> None:
    B, E = width_BE.shape
    dtype = weights.up_RCH.dtype
    x_TH = tokens(T, weights.up_RCH.shape[2], dtype)
    index_TK, weight_TK = route(T, E, 2)
    index_TK = more.get("index_TK", index_TK)
    token_budget_T = torch.arange(T, dtype=torch.int32) % B if budgets else None
    where = (x_TH, index_TK, weight_TK, weights, width_BE, token_budget_T)
    found, wanted = code.experts(*where).double(), naive(*where).double()
    assert found.shape == wanted.shape
    error = (found - wanted).abs().max() / wanted.abs().max().clamp(min=0.3)
    assert error < TOLERANCE[dtype]


STORED = (40, 0, 67, 1, 33)
WIDTHS = torch.tensor([[40, 0, 67, 1, 33], [17, 0, 64, 0, 32], [0, 0, 0, 0, 0]], dtype=torch.int32)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_mixed_budgets_odd_sizes(code, dtype) -> None:
    check(code, make(STORED, H=37, dtype=dtype), WIDTHS, T=23)


@pytest.mark.parametrize("T", [1, 70])
def test_one_token_and_more_pairs_than_a_block(code, T) -> None:
    check(code, make(STORED, H=20), WIDTHS, T=T, budgets=T > 1)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("gate", [True, False])
def test_activations_and_biases(code, name, gate) -> None:
    check(code, make(STORED, H=18, name=name, gate=gate, bias=True), WIDTHS, T=9)


def test_all_tokens_on_one_expert_and_experts_held_elsewhere(code) -> None:
    weights = make(STORED, H=16)
    check(code, weights, WIDTHS, T=40, index_TK=torch.full((40, 2), 2))
    elsewhere = torch.tensor([[-1, 2], [5, 0], [-1, 99], [4, 3]])
    check(code, weights, WIDTHS, T=4, index_TK=elsewhere)


def test_large_groups_take_large_tiles(code) -> None:
    assert code.tiles(2000, 5) != code.tiles(20, 5)
    check(code, make((24, 9), H=12), torch.tensor([[24, 5]], dtype=torch.int32), T=90)


def test_nothing_is_read_beyond_a_width(code) -> None:
    weights = make(STORED, H=16)
    beyond = torch.ones(sum(STORED), dtype=torch.bool)
    first = 0
    for e, rows in enumerate(STORED):
        beyond[first : first + int(WIDTHS[1, e])] = False
        first += rows
    weights.up_RCH[beyond] = float("nan")
    weights.down_RH[beyond] = float("nan")
    check(code, weights, WIDTHS[1:], T=21)


def test_nothing_left_in_memory_leaks(code, monkeypatch) -> None:
    """Activations are written to memory that nobody cleared."""
    empty = torch.Tensor.new_empty

    def poisoned(like: torch.Tensor, *size, **how) -> torch.Tensor:
        found = empty(like, *size, **how)
        return found.fill_(float("nan")) if found.is_floating_point() else found

    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    check(code, make(STORED, H=16), WIDTHS, T=21)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_graph_follows_widths_and_budgets_changed_in_place() -> None:
    weights = make(STORED, H=64)
    on_gpu = Weights(
        weights.up_RCH.cuda(),
        weights.down_RH.cuda(),
        weights.offset_E.cuda(),
        weights.activate,
        weights.activation,
    )
    x_TH, (index_TK, weight_TK) = tokens(32, 64).cuda(), (t.cuda() for t in route(32, 5, 2))
    width_BE = WIDTHS.cuda()
    token_budget_T = torch.zeros(32, dtype=torch.int32, device="cuda")
    where = (x_TH, index_TK, weight_TK, on_gpu, width_BE, token_budget_T)
    with torch.no_grad():
        for _ in range(3):
            experts(*where, backend="triton")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out_TH = experts(*where, backend="triton")
        for _ in range(2):
            graph.replay()
            torch.testing.assert_close(out_TH, torch_loop.experts(*where), rtol=1e-4, atol=1e-5)
            width_BE.copy_(WIDTHS.roll(1, 0))
            token_budget_T.copy_(torch.arange(32) % 3)
