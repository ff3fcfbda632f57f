"""Every architecture on the transformers experts interface goes through the one seam."""

import pytest
import torch

from flexmoe.errors import FlexmoeError
from flexmoe.experts import (
    expert_layers,
    experts_function,
    mask_forward,
    prefix_forward,
    routed_parameters,
)
from flexmoe.kernels import cpu, torch_loop
from flexmoe.observe import observe
from helpers import difference, ids_of, logits
from zoo import (
    DECODERS,
    OFF_INTERFACE,
    UNBUILDABLE,
    folder_of,
    interface_files,
    tiny_model,
    tiny_off_interface,
)

# The same float32 products in another order or grouping, a few layers deep; seen: up to 8e-6.
TOLERANCE = 3e-5
SEVERAL_GROUPS = {"ernie4_5_vl_moe"}  # text and vision experts in one layer: refused
SUPPORTED = [name for name in DECODERS if name not in SEVERAL_GROUPS]


def test_every_modelling_file_is_covered():
    assert {folder_of(name) for name in DECODERS} | set(UNBUILDABLE) == set(interface_files())
    assert len(SUPPORTED) >= 45


@pytest.mark.parametrize("name", SUPPORTED)
def test_observe_equals_eager_and_sees_every_pair(name):
    model = tiny_model(name)
    ids = ids_of(model)
    with experts_function(model, "eager"):
        want = logits(model, ids)
    seen = []

    def count(routing, h_SI):
        seen.append(len(routing.expert_S))
        return h_SI

    for layer in expert_layers(model):
        layer.module.flexmoe_observer = count
    with experts_function(model, "flexmoe_observe"):
        got = logits(model, ids)
    assert difference(got, want) < TOLERANCE
    assert len(seen) == len(expert_layers(model))
    assert all(pairs % ids.numel() == 0 and pairs for pairs in seen)


@pytest.mark.parametrize("name", SUPPORTED)
def test_masked_equals_sliced_and_ranked_equals_original(name):
    model = tiny_model(name)
    ids = ids_of(model)
    layers = expert_layers(model)
    with experts_function(model, "eager"):
        original = logits(model, ids)
    generator = torch.Generator().manual_seed(0)
    width, order = {}, {}
    for layer in layers:
        drawn = torch.randint(0, layer.I + 1, (layer.E,), generator=generator)
        drawn[0], drawn[1] = 0, layer.I
        width[layer.index] = drawn
        rank = [torch.randperm(layer.I, generator=generator) for _ in range(layer.E)]
        order[layer.index] = torch.stack(rank)
        kept = (torch.arange(layer.I) < drawn[:, None]).float()
        layer.module.flexmoe_mask_EI = torch.zeros_like(kept).scatter_(1, order[layer.index], kept)
    with experts_function(model, "flexmoe_mask"):
        masked = logits(model, ids)
    assert difference(masked, original) > 1e-3  # the cut can be seen
    for layer in layers:
        layer.permute_(order[layer.index])
    with experts_function(model, "eager"):
        ranked = logits(model, ids)
    assert difference(ranked, original) < TOLERANCE
    for layer in layers:
        layer.module.flexmoe_width_E = width[layer.index].tolist()
    with experts_function(model, "flexmoe"):
        sliced = logits(model, ids)
    assert difference(sliced, masked) < TOLERANCE


@pytest.mark.parametrize("name", SUPPORTED)
def test_gradients_of_channels_and_weights_arrive(name):
    model = tiny_model(name)
    statistics = observe(model, ids_of(model), ["fisher_EI", "taylor_EI"], batch_size=1)
    for stats in statistics.values():
        # the last token of each of the two windows predicts nothing, so it may have no gradient
        routed, cold = stats["count_E"] > 2, stats["count_E"] == 0
        assert routed.any()
        assert (stats["fisher_EI"][routed].sum(1) > 0).all()
        assert (stats["taylor_EI"][routed].sum(1) > 0).all()
        assert (stats["fisher_EI"][cold] == 0).all() and (stats["taylor_EI"][cold] == 0).all()
        assert stats.batches == 2 and stats.tokens == 24
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_pairs_of_experts_held_elsewhere_are_left_out(name):
    """Expert parallelism marks them by an index beyond the last expert and weight 0."""
    layer = expert_layers(tiny_model(name))[0]
    generator = torch.Generator().manual_seed(0)
    x_TH = torch.randn(5, layer.H, generator=generator)
    index_TK = torch.tensor([[0, 1], [2, 8], [8, 8], [8, 3], [7, 0]])
    weight_TK = torch.rand(5, 2, generator=generator) * (index_TK < layer.E)
    layer.module.flexmoe_mask_EI = torch.ones(layer.E, layer.I)
    layer.module.flexmoe_width_E = [layer.I] * layer.E
    want = mask_forward(layer.module, x_TH, index_TK.clamp_max(7), weight_TK)
    for function in (mask_forward, prefix_forward):
        got = function(layer.module, x_TH, index_TK, weight_TK)
        assert torch.allclose(got, want, atol=1e-6)
        none = function(layer.module, x_TH, torch.full_like(index_TK, 8), weight_TK * 0)
        assert (none == 0).all() and none.shape == x_TH.shape
    assert layer.module.flexmoe_load_E.sum() == 0


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"])
def test_tokens_of_one_batch_go_by_budgets_of_their_own(name):
    model = tiny_model(name)
    generator, T = torch.Generator().manual_seed(0), 24
    layer = expert_layers(model)[0]
    width_BE = torch.randint(0, layer.I + 1, (3, layer.E), generator=generator)
    width_BE[0] = 0
    x_TH = torch.randn(T, layer.H, generator=generator)
    index_TK = torch.rand(T, layer.E, generator=generator).topk(2).indices
    weight_TK = torch.rand(T, 2, generator=generator)
    budget_T = torch.randint(0, 3, (T,), generator=generator)
    alone = []
    with torch.no_grad():
        for row in width_BE.tolist():
            layer.module.flexmoe_width_E = row
            alone.append(prefix_forward(layer.module, x_TH, index_TK, weight_TK))
        want = torch.stack(alone)[budget_T, torch.arange(len(budget_T))]
        assert difference(alone[1], alone[2]) > 1e-3
        for table in (width_BE, width_BE.tolist()):
            layer.module.flexmoe_width_BE = table
            layer.module.flexmoe_token_budget_T = budget_T
            got = prefix_forward(layer.module, x_TH, index_TK, weight_TK)
            assert difference(got, want) < TOLERANCE
        with pytest.raises(FlexmoeError, match="budgets for 24 tokens, the batch has 23"):
            prefix_forward(layer.module, x_TH[1:], index_TK[1:], weight_TK[1:])
        layer.module.flexmoe_token_budget_T = None
        got = prefix_forward(layer.module, x_TH, index_TK, weight_TK)
        assert torch.equal(got, alone[2])


@pytest.mark.parametrize("name", ["qwen3_moe", "nemotron_h", "gpt_oss", "muse_spark"])
def test_a_compiled_kernel_runs_where_nobody_asks_for_gradients(name, monkeypatch):
    if cpu._library()[0] is None:
        pytest.skip("no compiler or no AVX2")
    layer = expert_layers(tiny_model(name))[0]
    layer.module.flexmoe_width_E = [layer.I // 2] * layer.E
    x_TH = torch.randn(5, layer.H, generator=torch.Generator().manual_seed(0))
    index_TK, weight_TK = torch.arange(10).view(5, 2) % layer.E, torch.rand(5, 2)
    ran = []
    for back in (cpu, torch_loop):
        own = back.experts
        monkeypatch.setattr(back, "experts", lambda *a, b=back, o=own: ran.append(b) or o(*a))
    learning = prefix_forward(layer.module, x_TH, index_TK, weight_TK)
    with torch.no_grad():
        serving = prefix_forward(layer.module, x_TH, index_TK, weight_TK)
    # the activation of gpt-oss is clamped, the outputs of muse_spark are normalised
    assert ran == [torch_loop, cpu if name in ("qwen3_moe", "nemotron_h") else torch_loop]
    assert learning.requires_grad and difference(serving, learning.detach()) < TOLERANCE


def test_counts_of_a_layer_are_those_of_its_parameters():
    for name in ("gpt_oss", "nemotron_h", "qwen3_moe"):
        model = tiny_model(name)
        counted = sum(layer.shape.parameters for layer in expert_layers(model))
        assert counted == routed_parameters(model)


@pytest.mark.parametrize("name", sorted(OFF_INTERFACE))
def test_models_off_the_interface_are_refused(name):
    try:
        model = tiny_off_interface(name)
    except ValueError:
        pytest.skip(f"not a causal decoder: {OFF_INTERFACE[name]}")
    with pytest.raises(FlexmoeError, match=r"experts interface|no routed experts") as error:
        expert_layers(model)
    assert type(model).__name__ in str(error.value)


def test_several_groups_of_experts_in_a_layer_are_refused():
    with pytest.raises(FlexmoeError, match="two experts modules in layer"):
        expert_layers(tiny_model("ernie4_5_vl_moe"))
