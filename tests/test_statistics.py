"""What a pass observes: declared statistics, their digits, and what they see of every kind of
architecture."""

from types import SimpleNamespace

import pytest
import torch

from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.observe import observe
from flexmoe.statistics import Statistic, statistic
from golden_data import observed, scores
from helpers import ids_of
from zoo import filled, model_class, tiny_config, tiny_model


def test_statistics_need_a_shape_and_a_router():
    for name in ("mine", "mine_IE", "mine_EQ"):
        with pytest.raises(FlexmoeError, match="must end in its shape"):
            statistic(name, when="forward")
    for wrong in ({"when": "now"}, {"merge": "mean"}, {"reads": ("routers",)}):
        with pytest.raises(FlexmoeError, match="expected backward, batch, forward, weights"):
            statistic("mine_E", **{"when": "forward", **wrong})
    model = tiny_model("zaya")  # its router is no matrix with a row for each expert
    with pytest.raises(FlexmoeError, match="reads the router's logits"):
        scores(model, torch.ones(1, 8, dtype=torch.long), "peu")


def test_subsets_are_of_few_experts():
    few, many = (SimpleNamespace(index=0, E=E, I=2, H=3) for E in (16, 17))
    subsets, plain = (Statistic(f"mine_{x}", "batch", "sum", len) for x in ("C", "EI"))
    assert subsets.zeros(few).shape == (2**16,) and plain.zeros(many).shape == (17, 2)
    with pytest.raises(FlexmoeError, match="subsets can be tried up to 16"):
        subsets.zeros(many)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float64, 1 + 2**-40), (torch.bfloat16, 1 + 2**-7)]
)
def test_sums_keep_digits_that_the_values_have_not(dtype, value):
    model = tiny_model("mixtral")

    def look(pairs):
        return torch.full_like(pairs.weight_S, value, dtype=dtype)

    found = observed(model, ids_of(model), look)
    for stats in found.values():
        assert torch.equal(stats["look_E"], value * stats["count_E"])


def test_a_pass_leaves_what_learns_as_it_was():
    model = tiny_model("mixtral")
    model.lm_head.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    observe(model, ids_of(model), ("fisher_EI", "taylor_EI"))
    assert [p.requires_grad for p in model.parameters()] == before
    assert all(p.grad is None for p in model.parameters())


EVERYTHING = (
    "norm_E",
    "output_EH",
    "projection_EI",
    "gate2_EI",
    "up2_EI",
    "turned_norm_E",
    "slope2_gate_EI",
    "contribution_EI",
    "weight_slope_EI",
    "input2_EH",
)
# biases, sigmoid routers, norms behind experts, no gate, a router in a module of its own, parallel
# attention, transposed and interleaved weights
VARIED = (
    "afmoe", "cohere2_moe", "deepseek_v3", "gemma4_text", "gpt_oss", "granitemoe", "jamba",
    "muse_spark", "nemotron_h", "phimoe",
)  # fmt: skip


@pytest.mark.parametrize("name", VARIED)
def test_statistics_see_every_kind_of_architecture(name):
    """The norm of an expert's outputs at least; their sum with the routing weights is what the
    module gave, and what the router said is its first output."""
    model = tiny_model(name)
    ids, seen = ids_of(model), {}

    def look(pairs):
        weighted = pairs.y_SH * pairs.weight_S[:, None]
        out = torch.zeros_like(pairs.all.out_TH).index_add(0, pairs.token_S, weighted)
        assert torch.allclose(out, pairs.all.out_TH, rtol=1e-4, atol=1e-6)
        assert pairs.residual_TH.shape[0] == pairs.logits_TE.shape[0] == ids.numel()
        assert all(side.shape == pairs.h_SI.shape for side in pairs.pre_SI)
        seen[pairs.layer.index] = pairs.logits_TE
        return pairs.weight_S

    found = observed(model, ids, look, "utility_E", *EVERYTHING, reads=("router", "residual"))
    assert len(seen) == len(found) == len(expert_layers(model))
    for stats in found.values():
        assert all(torch.isfinite(value).all() for value in stats.values.values())
        assert float(stats["norm_E"].sum()) > 0


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("mixtral", {}),
        ("granitemoe", {"residual_multiplier": 0.22}),
        ("minimax", {"mlp_alpha_factor": 3.5, "mlp_beta_factor": 2.0}),
    ],
)
def test_the_residual_stream_is_that_which_the_layer_adds_to(name, factors):
    """With what the experts give it makes the layer's output, in another unit."""
    config = tiny_config(name)
    for factor, value in factors.items():
        setattr(config, factor, value)
    model = filled(model_class(name)(config))
    seen, outputs = {}, {}
    for i, decoder in enumerate(model.model.layers):
        decoder.register_forward_hook(lambda *given, i=i: outputs.update({i: given[2]}))

    def look(pairs):
        seen[pairs.layer.index] = pairs.residual_TH + pairs.all.out_TH
        return pairs.weight_S

    observed(model, ids_of(model), look, reads=("residual",))
    unit = factors.get("residual_multiplier", factors.get("mlp_beta_factor", 1.0))
    for i, behind_TH in seen.items():
        output = outputs[i][0] if isinstance(outputs[i], tuple) else outputs[i]
        assert torch.allclose(unit * behind_TH, output.reshape(behind_TH.shape), atol=1e-5)


def test_architectures_without_a_norm_before_the_experts_are_refused():
    with pytest.raises(FlexmoeError, match="reads the residual stream"):
        scores(tiny_model("flex_olmo"), torch.ones(1, 8, dtype=torch.long), "easy-ep")
