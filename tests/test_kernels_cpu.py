"""The back end of compiled C++: threads, what is left to torch, and how it is built."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from flexmoe.errors import FlexmoeError
from flexmoe.kernels import cpu, experts
from test_kernels import TOLERANCE, check, make, route, stock, tokens


@pytest.fixture
def compiled():
    if cpu._library()[0] is None:
        pytest.skip("no compiler or no AVX2")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("in_stock", [True, False])
def test_other_tokens_of_a_batch_change_little(dtype, in_stock):
    """A token alone, and among more and more others. float32: only the way of summing up down may
    change (with its number of tokens, in ragged storage); bfloat16: tiles round activations."""
    weights = make([48] * 4, 300, dtype)
    weights = stock(weights) if in_stock else weights
    width_BE = torch.tensor([[48, 40, 32, 9]])
    x_TH, (index_TK, weight_TK) = tokens(40, 300, dtype), route(40, 4, 2)
    alone = experts(x_TH[:1], index_TK[:1], weight_TK[:1], weights, width_BE, backend="cpu")
    for T in (2, 3, 7, 40):
        routed = (x_TH[:T], index_TK[:T], weight_TK[:T])
        found = experts(*routed, weights, width_BE, backend="cpu")[:1]
        if dtype is torch.float32 and in_stock:
            assert torch.equal(found, alone)
        error = (found - alone).abs().max() / alone.abs().max()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 1.6e-2}[dtype]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_same_bits_with_any_number_of_threads(dtype):
    weights, threads, found = make([48] * 6, 300, dtype), torch.get_num_threads(), []
    width_BE = torch.tensor([[48, 1, 30, 7, 0, 48]]).int()
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            routed = (tokens(40, 300, dtype), *route(40, 6, 2))
            found.append(experts(*routed, weights, width_BE, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(out, found[0]) for out in found)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_two_threads_at_once_do_not_meet(dtype):
    """Memory is kept between calls: that of one thread must not be another's."""
    weights = make([17, 32, 5, 40], 48, dtype)
    width_BE = torch.tensor([[17, 20, 5, 33]]).int()
    calls = [(tokens(T, 48, dtype), *route(T, 4, 2), weights, width_BE) for T in (1, 7, 40)]
    alone = [experts(*call, backend="cpu") for call in calls]

    def run(n):
        return all(torch.equal(experts(*calls[n], backend="cpu"), alone[n]) for _ in range(300))

    with ThreadPoolExecutor(len(calls)) as pool:
        assert all(pool.map(run, range(len(calls))))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("in_stock", [True, False])
def test_experts_of_many_tokens_go_to_torch(in_stock, plain, monkeypatch):
    """Those of many tokens at one budget do, the others of the batch do not."""
    monkeypatch.setattr(cpu, "_many", lambda: 6)
    seen, add = [], cpu._add_products
    monkeypatch.setattr(cpu, "_add_products", lambda *a: seen.append(a[2]) or add(*a))
    weights = make([20] * 4, 40, gate=not plain, bias=not plain)
    weights = stock(weights) if in_stock else weights
    index_TK = torch.tensor([[0, 1]] * 6 + [[0, 2], [-1, 3], [4, 3]])
    routed = (tokens(9, 40), index_TK, torch.rand(9, 2).double(), weights)
    width_BE = torch.tensor([[20, 3, 9, 0], [7, 0, 20, 11]])
    check("cpu", *routed, width_BE)
    assert not seen  # the experts are small
    monkeypatch.setattr(cpu, "SMALL", 0)
    check("cpu", *routed, width_BE)
    assert seen.pop().unique().tolist() == [-1, 0, 1]
    check("cpu", *routed, width_BE, None, 1)
    assert seen.pop().unique().tolist() == [-1, 0, 1]
    check("cpu", *routed, width_BE * 0 - 2)
    assert seen.pop().unique().tolist() == [-1, 0, 1]
    check("cpu", *routed, width_BE, torch.tensor([0, 1, 1, 1, 1, 1, 1, 0, 1, 1]).int())
    assert seen.pop()[[0, 6]].tolist() == [[-1, -1], [0, -1]]
    check("cpu", *routed, width_BE, torch.arange(9).int() % 2)
    assert not seen
    halves = make([20] * 4, 40, torch.bfloat16, gate=not plain)
    check("cpu", tokens(9, 40, torch.bfloat16), *routed[1:3], halves, width_BE)
    assert not seen  # in bfloat16 never


def test_what_it_would_misread_is_refused():
    weights, x_TH = make([8] * 4, 16), tokens(3, 16)
    odd = torch.zeros(4, 8, 16, 2)[..., 0]  # no axis of neighbours
    for wrong, x_wrong_TH, why in (
        (replace(weights, down=weights.down.bfloat16()), x_TH, "not all float32 or all bfloat16"),
        (make([8] * 4, 16, torch.float16), x_TH, "weights are torch.float16"),
        (weights, x_TH.half(), "tokens are torch.float16"),
        (replace(stock(weights), down=odd), x_TH, "down is neither by channel nor by column"),
        (replace(weights, activation="tanh"), x_TH, "activation 'tanh' is not one of"),
    ):
        assert why in cpu.can_run(wrong, x_wrong_TH)


def test_weights_with_scales_go_to_torch():
    weights, width_BE = make([8] * 4, 16), torch.tensor([[8, 0, 3, 8]])
    routed, up_RC, down_R = (tokens(5, 16), *route(5, 4, 2)), torch.rand(32, 2), torch.rand(32)
    scaled = replace(weights, up_scale=up_RC, down_scale=down_R)
    up, down = weights.up * up_RC[..., None], weights.down * down_R[:, None]
    want = experts(*routed, replace(weights, up=up, down=down), width_BE)
    assert torch.allclose(experts(*routed, scaled, width_BE), want, atol=1e-6)
    for alone in ({"up_scale": None}, {"down_scale": None}):
        with pytest.raises(FlexmoeError, match="weights have scales"):
            experts(*routed, replace(scaled, **alone), width_BE, backend="cpu")


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("many", [1, 100])
def test_a_budget_that_is_not_in_the_table_is_an_error(many, monkeypatch):
    monkeypatch.setattr(cpu, "SMALL", 0)
    monkeypatch.setattr(cpu, "_many", lambda: many)
    index_TK, weight_TK = route(3, 4, 2)
    weights = make([8] * 4, 16)

    def run(index_TK, *how):
        rest = (weights, torch.full((2, 4), 8), *how)
        return experts(tokens(3, 16), index_TK, weight_TK, *rest, backend="cpu")

    for wrong in ((torch.tensor([0, 7, 0]),), (torch.tensor([0, 0, -1]),), (None, 2), (None, -1)):
        with pytest.raises(FlexmoeError, match="not in the table"):
            run(index_TK, *wrong)
    index_TK[2] = 4  # held elsewhere: its budget does not matter
    assert run(index_TK, torch.tensor([0, 1, -1]))[2].eq(0).all()


@pytest.mark.parametrize("compiler", ["no-such-compiler", "false"])
def test_without_a_compiler_torch_runs_and_one_line_says_so(
    monkeypatch, tmp_path, caplog, compiler
):
    monkeypatch.setenv("CXX", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cpu._library.cache_clear()
    try:
        routed = (tokens(3, 16), *route(3, 4, 2), make([8] * 4, 16), torch.full((1, 4), 8))
        for _ in range(2):
            check(None, *routed)
        assert len(caplog.records) == 1 and compiler in caplog.text
        with pytest.raises(FlexmoeError, match=compiler):
            experts(*routed, backend="cpu")
    finally:
        cpu._library.cache_clear()
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("target", list(cpu.TARGETS))
def test_targets_compile_and_two_processes_may_at_the_same_time(tmp_path, monkeypatch, target):
    several = 2 if target == cpu._target() else 1
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code = f"from flexmoe.kernels import cpu; print(cpu.build('{target}'))"
    builds = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(several)
    ]
    paths = {process.communicate()[0].strip() for process in builds}
    assert {process.returncode for process in builds} == {0}
    assert {str(path) for path in tmp_path.rglob("*") if path.is_file()} == paths
