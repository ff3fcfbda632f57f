"""Cases of the Triton back end: on a GPU as it is, else (TRITON_INTERPRET=1) on the CPU. Run by
test_kernels_triton.py in a process of its own, because Triton reads that variable on import."""

from dataclasses import replace

import pytest
import torch

from flexmoe.errors import FlexmoeError
from flexmoe.kernels import experts, triton_gpu, triton_pairs
from test_kernels import ONE, make, naive, route, stock, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Largest error over largest output; float16 and bfloat16 round x, activations and output.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def on_device(weights):
    moved = {k: v.to(DEVICE) for k, v in vars(weights).items() if isinstance(v, torch.Tensor)}
    return replace(weights, **moved)


def run(x_TH, index_TK, weight_TK, weights, width_BE, token_budget_T=None, budget=0):
    x_TH, index_TK, weight_TK, width_BE = (
        t.to(DEVICE) for t in (x_TH, index_TK, weight_TK, width_BE)
    )
    if token_budget_T is not None:
        token_budget_T = token_budget_T.to(DEVICE)
    rest = (on_device(weights), width_BE, token_budget_T, budget)
    return experts(x_TH, index_TK, weight_TK, *rest, backend="triton").cpu()


def check(x_TH, index_TK, weight_TK, weights, *how):
    found = run(x_TH, index_TK, weight_TK, weights, *how)
    want = naive(x_TH, index_TK, weight_TK, weights, *how)
    assert found.dtype == x_TH.dtype and found.shape == x_TH.shape
    error = (found.double() - want).abs().max() / want.abs().max().clamp_min(0.3)
    assert error < TOLERANCE[weights.up.dtype], float(error)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Memory that is not written holds NaN."""

    def filled(make):
        def fill(*a, **k):
            made = make(*a, **k)
            return made.fill_(float("nan")) if made.is_floating_point() else made

        return fill

    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", filled(torch.Tensor.new_empty))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("T, H", [(1, 7), (3, 1), (37, 33), (150, 70)])
def test_odd_sizes_and_ragged_widths(dtype, T, H):
    width_BE = torch.tensor([[5, 1, 63, 0, 0, 37]]).int()
    weights = make([5, 1, 64, 0, 33, 40], H, dtype)
    check(tokens(T, H, dtype), *route(T, 6, 3, dtype), weights, width_BE)


@pytest.mark.parametrize(
    "dtype, full, gate",
    [
        (torch.bfloat16, True, True),
        (torch.bfloat16, False, False),
        (torch.float16, False, True),
    ],
)
def test_many_pairs_of_an_expert_are_read_by_rows(dtype, full, gate, monkeypatch):
    seen = []
    by_rows = triton_gpu._by_rows
    monkeypatch.setattr(triton_gpu, "_by_rows", lambda *a: seen.append(by_rows(*a)) or seen[-1])
    able = triton_gpu._roomy(torch.device(DEVICE))  # not on every GPU
    weights = make([40, 72, 72, 72] if not full else [72] * 4, 64, dtype, gate=gate)
    routed = (tokens(200, 64, dtype), *route(200, 4, 2, dtype))
    width_BE = torch.tensor([[40, 72, 0, 65], [7, 64, 1, 0]]).int()
    check(*routed, weights, width_BE, torch.arange(200) % 2)
    for e, widest in enumerate((7, 64, 1, 0)):  # what lies beyond a width is not used
        beyond = slice(int(weights.offset_E[e]) + widest, int(weights.offset_E[e + 1]))
        weights.up[beyond] = weights.down[beyond] = float("nan")
    check(*routed, weights, width_BE, None, 1)
    assert seen == [able] * 4
    if full:
        seen.clear()
        exact = make([72] * 4, 64, dtype, gate=gate)
        check(*routed, stock(exact), width_BE, torch.arange(200) % 2)
        assert seen == [able, False]  # there a channel is a column of down


def test_sides_that_do_not_lie_in_rows_are_read_by_address():
    weights = make([48] * 4, 64, torch.bfloat16)
    E, I, H = 4, 48, 64
    by_e, by_c, by_side = I * 96 + 96 * 96, 96, 32 * 96 + 40
    memory = torch.full((E * by_e + by_side + H,), float("nan"), dtype=torch.bfloat16)
    up = memory.as_strided((E, I, 2, H), (by_e, by_c, by_side, 1))
    up[:, :32] = weights.up.unflatten(0, (E, I))[:, :32]
    odd = replace(weights, up=up, down=weights.down.unflatten(0, (E, I)), offset_E=None)
    routed = (tokens(200, H, torch.bfloat16), *route(200, 4, 2, torch.bfloat16))
    check(*routed, odd, torch.full((1, E), 32).int())
    assert not triton_gpu._by_rows(up, up.stride())


@pytest.mark.parametrize("name", list(ONE))
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_activations_gates_and_biases(name, gate, bias):
    weights = make([9, 16, 0, 21], 40, name=name, gate=gate, bias=bias)
    width_BE = torch.tensor([[9, 7, 0, 21]]).int()
    check(tokens(13, 40), *route(13, 4, 2), weights, width_BE)


@pytest.mark.parametrize("name", list(ONE))
def test_a_token_that_is_no_number_stays_none(name):
    weights, x_TH = make([5, 3], 16, name=name, gate=False), tokens(3, 16)
    x_TH[1] = float("nan")
    found = run(x_TH, *route(3, 2, 2), weights, torch.tensor([[5, 3]]).int())
    assert found[1].isnan().all() and found[[0, 2]].isfinite().all()


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_stock_storage_as_it_lies(gate, transposed):
    weights = make([37] * 4, 33, gate=gate, bias=True)
    width_BE = torch.tensor([[37, 1, 0, 20], [5, 0, 36, 37]]).int()
    routed = (tokens(19, 33), *route(19, 4, 2))
    for concatenated in (True, False):
        lying = stock(weights, concatenated, transposed)
        check(*routed, lying, width_BE, torch.arange(19) % 2)


@pytest.mark.parametrize("full", [True, False])
def test_float8_weights_are_scaled_row_by_row(full):
    exact = make([37] * 4, 33, bias=True)

    def rounded(tensor):
        scale = tensor.abs().amax(-1) / 448  # the largest float8_e4m3fn
        return (tensor / scale[..., None]).to(torch.float8_e4m3fn), scale

    (up, up_scale), (down, down_scale) = rounded(exact.up), rounded(exact.down)
    scaled = replace(exact, up=up, down=down, up_scale=up_scale, down_scale=down_scale)
    same = replace(
        exact,
        up=up.float() * up_scale[..., None],
        down=down.float() * down_scale[..., None],
    )
    if full:
        stored = ("up", "down", "up_bias", "up_scale", "down_scale")
        parts = {name: getattr(scaled, name).unflatten(0, (4, -1)) for name in stored}
        scaled = replace(scaled, **parts, offset_E=None)
    width_BE = torch.tensor([[37, 1, 0, 20], [5, 0, 36, 37]]).int()
    routed = (tokens(19, 33), *route(19, 4, 2))
    how = (width_BE, torch.arange(19) % 2)
    want = naive(*routed, same, *how)
    for found in (run(*routed, scaled, *how), experts(*routed, scaled, *how, backend="torch")):
        assert (found.double() - want).abs().max() / want.abs().max() < 2e-6
    with pytest.raises(FlexmoeError, match="float8_e4m3fn has scales"):
        run(*routed, replace(scaled, up_scale=None), *how)
    # activations times a small scale of down are beneath what float16 holds
    tiny = {"down_scale": scaled.down_scale / 64, "down_bias_EH": None}
    scaled, same = replace(scaled, **tiny), replace(same, down=same.down / 64, down_bias_EH=None)
    x_TH, index_TK, weight_TK = routed
    routed = (x_TH.half(), index_TK, weight_TK.half())
    want = naive(*routed, same, *how)
    assert (run(*routed, scaled, *how).double() - want).abs().max() / want.abs().max() < 8e-3


def test_three_budgets_in_a_batch_and_one_by_number():
    E, I, H, T = 6, 40, 48, 90
    random = torch.Generator().manual_seed(3)
    width_BE = torch.randint(0, I + 1, (3, E), generator=random)
    width_BE[0], width_BE[2, 0] = I, 0
    routed = (tokens(T, H), *route(T, E, 2), make([I] * E, H), width_BE)
    longer = torch.randint(0, 3, (T + 9,), generator=random).int()
    check(*routed, longer)
    check(*routed, None, 2)


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("budget_T", [None, [1]])
def test_one_token(index, budget_T):
    weights = make([30] * 4, 40, bias=True)
    width_BE = torch.tensor([[30, 12, 0, 30], [9, 3, 1, 0]]).int()
    x_TH, (_, weight_TK) = tokens(1, 40), route(1, 4, 4)
    index_TK = torch.tensor([[2, -1, 0, 4]], dtype=index)
    budget_T = None if budget_T is None else torch.tensor(budget_T)
    check(x_TH, index_TK, weight_TK, weights, width_BE, budget_T)
    many = torch.zeros(1, 400, dtype=index)  # more choices than a block holds
    assert triton_gpu.Pairs.of(many, width_BE[:, :1], None, 0).block == triton_gpu.SMALLEST


def test_one_expert_int32_indices_and_inputs_of_any_strides():
    weights = make([33], 64, torch.bfloat16, bias=True)
    x_TH = tokens(64, 150, torch.bfloat16).T
    index_TK = torch.zeros(2, 150, dtype=torch.int32).T[:, :1]
    weight_TK = torch.rand(2, 150).bfloat16().T[:, :1]
    for width in (33, 0):
        check(x_TH, index_TK, weight_TK, weights, torch.tensor([[width]]).int())


def test_experts_without_channels_give_their_bias():
    weights = make([1] * 4, 64, torch.bfloat16, bias=True)
    nothing = {name: getattr(weights, name)[:0] for name in ("up", "down", "up_bias")}
    weights = replace(weights, **nothing, offset_E=torch.zeros(5).int())
    routed = (tokens(200, 64, torch.bfloat16), *route(200, 4, 2, torch.bfloat16))
    check(*routed, weights, torch.zeros(1, 4).int())


def test_all_tokens_on_one_expert_and_experts_held_elsewhere():
    weights = make([30] * 4, 40, bias=True)
    width_BE = torch.tensor([[30, 12, 30, 30]]).int()
    index_TK, weight_TK = torch.ones(300, 1, dtype=torch.long), torch.rand(300, 1)
    check(tokens(300, 40), index_TK, weight_TK, weights, width_BE)
    index_TK[::3], index_TK[1::3] = 4, -1
    check(tokens(300, 40), index_TK, weight_TK, weights, width_BE)
    nowhere = torch.full_like(index_TK, 99)
    assert run(tokens(300, 40), nowhere, weight_TK, weights, width_BE).eq(0).all()
    assert run(tokens(0, 40), index_TK[:0], weight_TK[:0], weights, width_BE).shape == (0, 40)


def test_channels_beyond_a_width_are_never_read():
    weights = make([32] * 4, 40, bias=True)
    width_BE = torch.tensor([[0, 1, 31, 32], [32, 3, 8, 0]]).int()
    for e, widest in enumerate(width_BE.amax(0).tolist()):
        for tensor in (weights.up, weights.down, weights.up_bias):
            tensor[int(weights.offset_E[e]) + widest : int(weights.offset_E[e + 1])] = float("nan")
    check(tokens(70, 40), *route(70, 4, 3), weights, width_BE, torch.arange(70) % 2)


@pytest.mark.parametrize(
    "T, E, K, B, size", [(1, 5, 2, 1, 16), (40, 3, 2, 4, 16), (5000, 6, 1, 3, 32)]
)
def test_blocks_hold_every_pair_once_and_their_number_is_enough(T, E, K, B, size):
    index_TK = torch.randint(-1, E + 1, (T, K), generator=torch.Generator().manual_seed(T))
    budget_T = torch.arange(T) % B
    moved = index_TK.to(DEVICE), E, budget_T.to(DEVICE), B, size
    position_S, *blocks = (t.cpu() for t in triton_pairs.sort(*moved))
    found = []
    for expert, start, stop in zip(*blocks, strict=True):
        assert 0 <= stop - start <= size
        for position in position_S[start:stop].tolist():
            assert int(index_TK.view(-1)[position]) == expert
            found.append(position)
    local = ((index_TK >= 0) & (index_TK < E)).view(-1).nonzero().flatten().tolist()
    assert sorted(found) == local
    order = [(int(index_TK.view(-1)[p]), int(budget_T[p // K]), p) for p in found]
    assert order == sorted(order)


def test_the_largest_expert_is_read_again_when_offsets_change_in_place():
    offset_E = torch.tensor([0, 3, 5]).int()
    assert triton_gpu.largest(offset_E) == 3
    offset_E[1:] = torch.tensor([1, 9])
    assert triton_gpu.largest(offset_E) == 8
