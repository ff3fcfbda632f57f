"""Every back end of the ragged experts against a naive loop in float64, token by token."""

import os
import pickle
import subprocess
import sys
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from emulation import emulate
from flexmoe.errors import FlexmoeError
from flexmoe.kernels import Weights, cpu, experts, interface
from flexmoe.kernels.activations import name_of

# Largest error over largest output (over 0.3 if that is less: operands are of size 1). bfloat16:
# the torch loop rounds activations and outputs to 8 bits, the compiled kernel only what it is given
# and gives back.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2}

ONE = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda v: F.gelu(v, approximate="tanh"),
    "relu2": lambda v: F.relu(v).square(),
}


@pytest.fixture(params=["torch", *cpu.TARGETS])
def backend(request, monkeypatch):
    """The torch loop, and the source for every instruction set, emulated where there is none."""
    if request.param == "torch":
        return "torch"
    if cpu._library()[0] is None:
        pytest.skip("no compiler or no AVX2")
    if (targets := list(cpu.TARGETS)).index(request.param) > targets.index(cpu._target()):
        emulate(monkeypatch, request.param)
    monkeypatch.setattr(cpu, "_target", lambda: request.param)
    monkeypatch.setattr(cpu, "_library", cpu._library.__wrapped__)
    return "cpu"


def gated(one):
    return lambda pre: one(pre.chunk(2, -1)[0]) * pre.chunk(2, -1)[1]


def make(stored, H, dtype=torch.float32, name="silu", gate=True, bias=False):
    """Random weights of experts with ``stored`` channels each."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=random).to(dtype)

    R, C = sum(stored), 1 + gate
    return Weights(
        up=draw(R, C, H) / H**0.5,
        down=draw(R, H) / max(stored) ** 0.5,
        offset_E=torch.tensor([0, *stored]).cumsum(0).int(),
        activate=gated(ONE[name]) if gate else ONE[name],
        activation=name,
        up_bias=draw(R, C) if bias else None,
        down_bias_EH=draw(len(stored), H) if bias else None,
    )


def stock(weights, concatenated=True, transposed=False):
    """The same experts, all of one size, as views on parameters in the layouts of transformers."""
    E = len(weights.offset_E) - 1
    up, down = weights.up.unflatten(0, (E, -1)), weights.down.unflatten(0, (E, -1))
    bias = None if weights.up_bias is None else weights.up_bias.unflatten(0, (E, -1))
    if concatenated:  # sides one after the other, each channel a row
        up = up.transpose(1, 2).contiguous().transpose(1, 2)
        bias = None if bias is None else bias.mT.contiguous().mT
    if transposed:  # channels are columns of gate and up
        up = up.flatten(1, 2).mT.contiguous().mT.unflatten(1, up.shape[1:3])
    else:  # and rows of down here, columns there
        down = down.mT.contiguous().mT
    return replace(weights, up=up, down=down, up_bias=bias, offset_E=None)


def route(T, E, K, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    H_of_x = torch.rand(T, E, generator=random)
    weight_TK, index_TK = H_of_x.topk(K)
    return index_TK, weight_TK.to(dtype)


def tokens(T, H, dtype=torch.float32):
    return torch.randn(T, H, generator=torch.Generator().manual_seed(2)).to(dtype)


def naive(x_TH, index_TK, weight_TK, weights, width_BE, token_budget_T=None, budget=0):
    out_TH = torch.zeros(x_TH.shape, dtype=torch.float64)
    for t, (chosen, routing_weight) in enumerate(
        zip(index_TK.tolist(), weight_TK.double(), strict=True)
    ):
        b = budget if token_budget_T is None else int(token_budget_T[t])
        for e, r in zip(chosen, routing_weight, strict=True):
            if not 0 <= e < width_BE.shape[1]:
                continue
            full, w = weights.offset_E is None, max(0, int(width_BE[b, e]))
            first = 0 if full else int(weights.offset_E[e])
            up, down, bias = (
                None
                if stored is None
                else (stored[e] if full else stored)[first : first + w].double()
                for stored in (weights.up, weights.down, weights.up_bias)
            )
            pre_wC = up @ x_TH[t].double()
            if bias is not None:
                pre_wC = pre_wC + bias
            h_w = weights.activate(pre_wC.T.reshape(1, -1))[0]
            y_H = h_w @ down
            if weights.down_bias_EH is not None:
                y_H = y_H + weights.down_bias_EH[e].double()
            out_TH[t] += r * y_H
    return out_TH


def check(backend, x_TH, index_TK, weight_TK, weights, *how):
    found = experts(x_TH, index_TK, weight_TK, weights, *how, backend=backend)
    want = naive(x_TH, index_TK, weight_TK, weights, *how)
    assert found.dtype == x_TH.dtype and found.shape == x_TH.shape
    error = (found.double() - want).abs().max() / want.abs().max().clamp_min(0.3)
    assert error < TOLERANCE[weights.up.dtype], float(error)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("H", [1, 7, 33, 64, 300])
@pytest.mark.parametrize("T", [1, 2, 3, 5, 37, 150])
def test_odd_sizes_and_ragged_widths(backend, dtype, H, T):
    stored = [5, 1, 64, 0, 33, 40]
    width_BE = torch.tensor([[5, 1, 63, 0, 0, 37]]).int()
    weights = make(stored, H, dtype)
    check(backend, tokens(T, H, dtype), *route(T, 6, 3, dtype), weights, width_BE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(ONE))
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_activations_gates_and_biases(backend, dtype, name, gate, bias):
    weights = make([9, 16, 0, 21], 40, dtype, name, gate, bias)
    width_BE = torch.tensor([[9, 7, 0, 21]]).int()
    check(backend, tokens(13, 40, dtype), *route(13, 4, 2, dtype), weights, width_BE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("I, H", [(1, 40), (37, 33), (64, 300)])
@pytest.mark.parametrize("T", [1, 5, 70])
def test_stock_storage_as_it_lies(backend, dtype, gate, I, H, T):
    weights = make([I] * 6, H, dtype, gate=gate, bias=True)
    width_BE = torch.tensor([[I, 1, I - 1, 0, I // 2, I]] * 2).int()
    routed = (tokens(T, H, dtype), *route(T, 6, 3, dtype))
    for concatenated in (True, False):
        lying = stock(weights, concatenated)
        assert not lying.down.is_contiguous() or I == 1
        check(backend, *routed, lying, width_BE)
        check(backend, *routed, lying, width_BE, torch.arange(T) % 2)


def test_channels_that_are_columns_go_to_torch():
    lying = stock(make([16] * 4, 40), concatenated=False, transposed=True)
    routed = (tokens(3, 40), *route(3, 4, 2), lying, torch.full((1, 4), 9))
    check(None, *routed)
    if cpu._library()[0] is not None:
        with pytest.raises(FlexmoeError, match="gate and up of a channel are not rows"):
            experts(*routed, backend="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_three_budgets_in_a_batch_and_one_by_number(backend, dtype):
    E, I, H, T = 6, 40, 48, 50
    weights = make([I] * E, H, dtype)
    random = torch.Generator().manual_seed(3)
    width_BE = torch.randint(0, I + 1, (3, E), generator=random).int()
    width_BE[0], width_BE[2, 0] = I, 0
    routed = (tokens(T, H, dtype), *route(T, E, 2, dtype), weights, width_BE)
    check(backend, *routed, torch.randint(0, 3, (T,), generator=random).int())
    check(backend, *routed, None, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_tokens_on_one_expert_and_experts_held_elsewhere(backend, dtype):
    weights = make([200] * 4, 40, dtype)
    width_BE = torch.tensor([[30, 183, 30, 30]]).int()
    index_TK = torch.ones(240, 1, dtype=torch.long)
    weight_TK = torch.rand(240, 1)
    check(backend, tokens(240, 40, dtype), index_TK, weight_TK, weights, width_BE)
    check(backend, tokens(240, 40, dtype), index_TK, weight_TK, stock(weights), width_BE)
    index_TK[::3], index_TK[1::3] = 4, -1
    check(backend, tokens(240, 40, dtype), index_TK, weight_TK, weights, width_BE)
    nowhere = torch.full_like(index_TK, 99)
    out = experts(tokens(240, 40, dtype), nowhere, weight_TK, weights, width_BE, backend=backend)
    assert out.eq(0).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("H", [40, 96])
@pytest.mark.parametrize("T", [1, 3, 4, 7, 8, 9, 16, 17, 20, 21, 26])
def test_wide_experts_of_few_tokens(backend, T, H, dtype):
    weights = make([200, 130, 65, 97], H, dtype, bias=True)
    width_BE = torch.tensor([[183, 129, 65, 96]]).int()
    check(backend, tokens(T, H, dtype), *route(T, 4, 4, dtype), weights, width_BE)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [1, 4, 30])
def test_rows_longer_than_what_is_computed_at_a_time(backend, T, dtype):
    weights, width_BE = make([37] * 2, 4133, dtype), torch.tensor([[35, 12]]).int()
    for lying in (weights, stock(weights)):
        check(backend, tokens(T, 4133, dtype), *route(T, 2, 2, dtype), lying, width_BE)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("T", [1, 3, 20, 70])
def test_channels_beyond_a_width_are_never_read(backend, T, dtype):
    weights = make([32] * 4, 40, dtype, bias=True)
    width_BE = torch.tensor([[0, 1, 31, 32], [32, 3, 8, 0]]).int()
    for e, widest in enumerate(width_BE.amax(0).tolist()):
        for tensor in (weights.up, weights.down, weights.up_bias):
            tensor[int(weights.offset_E[e]) + widest : int(weights.offset_E[e + 1])] = float("nan")
    routed = (tokens(T, 40, dtype), *route(T, 4, 3))
    check(backend, *routed, weights, width_BE, torch.arange(T) % 2)


def test_tokens_of_another_dtype_than_the_weights(backend, monkeypatch):
    if backend == "cpu":  # by torch's products too, with 30 tokens
        monkeypatch.setattr(cpu, "SMALL", 0)
        monkeypatch.setattr(cpu, "_many", lambda: 6)
    weights, width_BE = make([20] * 4, 40, bias=True), torch.full((1, 4), 17)
    for T in (2, 30):
        x_TH, routed = tokens(T, 40, torch.bfloat16), route(T, 4, 2)
        found = experts(x_TH, *routed, weights, width_BE, backend=backend)
        want = naive(x_TH, *routed, weights, width_BE)
        assert found.dtype == torch.bfloat16
        assert (found.double() - want).abs().max() < 2**-8 * want.abs().max()


@pytest.mark.parametrize("name", list(ONE))
def test_a_token_that_is_no_number_stays_none(backend, name):
    weights, x_TH = make([5, 3], 16, name=name, gate=False), tokens(3, 16)
    x_TH[1] = float("nan")
    routed = (x_TH, *route(3, 2, 2), weights, torch.tensor([[5, 3]]))
    found = experts(*routed, backend=backend)
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


def test_tables_that_do_not_go_together_are_refused():
    weights, width_BE = make([5, 3], 16), torch.tensor([[5, 3]])
    x_TH, index_TK, weight_TK = tokens(3, 16), *route(3, 2, 2)
    for wrong in (
        (x_TH, index_TK[:1], weight_TK[:1], weights, width_BE),
        (x_TH, index_TK, weight_TK[:, :1], weights, width_BE),
        (tokens(3, 20), index_TK, weight_TK, weights, width_BE),
        (x_TH, index_TK, weight_TK, weights, torch.tensor([[5, 3, 1]])),
        (x_TH, index_TK, weight_TK, weights, width_BE, torch.zeros(2).int()),
    ):
        with pytest.raises(FlexmoeError, match="do not go together"):
            experts(*wrong)


def test_the_first_that_can_run_is_taken_and_a_forced_one_says_why_not(monkeypatch):
    weights = make([8] * 4, 16)
    routed = (tokens(3, 16), *route(3, 4, 2))
    width_BE = torch.full((1, 4), 8)
    if cpu._library()[0] is not None:
        assert interface._backend(weights, routed[0], routed[2], None) is cpu
        learns = replace(weights, up=weights.up.clone().requires_grad_())
        with torch.no_grad():
            assert interface._backend(learns, routed[0], routed[2], None) is cpu
    with pytest.raises(FlexmoeError, match=r"unknown kernel 'tourch'.*Did you mean 'torch'"):
        experts(*routed, weights, width_BE, backend="tourch")
    odd = Weights(weights.up, weights.down, weights.offset_E, gated(torch.tanh))
    with pytest.raises(FlexmoeError, match="'cpu' was asked for and cannot run: activation ''"):
        experts(*routed, odd, width_BE, backend="cpu")
    monkeypatch.setattr(interface, "FORCED", "cpu")  # what FLEXMOE_KERNEL says
    x_TH = routed[0].clone().requires_grad_()
    with pytest.raises(FlexmoeError, match="gradients"):
        experts(x_TH, *routed[1:], weights, width_BE)
    monkeypatch.setattr(interface, "FORCED", None)
    check(None, *routed, odd, width_BE)
    experts(x_TH, *routed[1:], weights, width_BE).sum().backward()
    assert x_TH.grad.isfinite().all()


def test_the_environment_forces_a_kernel():
    show = "from flexmoe.kernels import interface; print(interface.FORCED)"
    for value in ("torch", ""):
        env = os.environ | {"FLEXMOE_KERNEL": value}
        run = subprocess.run([sys.executable, "-c", show], env=env, capture_output=True, text=True)
        assert run.stdout.strip() == (value or "None"), run.stderr


def test_what_a_call_found_out_is_kept_only_while_it_holds():
    """Weights that moved, lie otherwise or have another dtype are looked at anew."""
    weights, width_BE = make([5, 7], 16), torch.tensor([[5, 7]])
    call = (tokens(2, 16), *route(2, 2, 1), weights, width_BE)

    def learned():
        before = len(weights.kept)
        with torch.no_grad():
            got = experts(*call)
        assert torch.allclose(got, experts(*call, backend="torch"), atol=1e-5)
        return len(weights.kept) - before

    assert learned() and not learned()
    weights.up.data = weights.up.clone() + 1  # as `module.to` does: the same tensor elsewhere
    assert not learned()
    weights.down.data = weights.down.mT.contiguous().mT  # other strides
    assert learned() and not learned()
    weights.up.data, weights.down.data = weights.up.double(), weights.down.double()
    call = (call[0].double(), *call[1:])
    assert learned()
    copied = pickle.loads(pickle.dumps(replace(weights, activate=F.silu)))
    assert weights.kept and not copied.kept and not deepcopy(weights).kept
    assert not replace(weights, activation="").kept


@pytest.mark.parametrize("name", list(ONE))
@pytest.mark.parametrize("gate", [True, False])
def test_activations_are_known_by_what_they_do(name, gate):
    device, one = torch.device("cpu"), ONE[name]
    assert name_of(gated(one) if gate else one, gate, device) == name
    for odd in (lambda v: one(v.clamp(max=7)), lambda v: one(v) + 1e-3, torch.tanh):
        assert name_of(gated(odd) if gate else odd, gate, device) == ""
    assert (
        name_of(lambda pre: one(pre.chunk(2, -1)[0]) * (pre.chunk(2, -1)[1] + 1), True, device)
        == ""
    )


def test_outputs_that_are_normalised_go_to_torch():
    weights = replace(make([8] * 4, 16, bias=True), norm=lambda y_nH: y_nH / 2)
    routed = (tokens(5, 16), *route(5, 4, 2))
    width_BE = torch.tensor([[8, 0, 3, 8]])
    found = experts(*routed, weights, width_BE)
    want = experts(*routed, replace(weights, norm=None), width_BE)
    assert torch.allclose(found, want / 2, atol=1e-6)
    with pytest.raises(FlexmoeError, match="normalised"):
        experts(*routed, weights, width_BE, backend="cpu")
