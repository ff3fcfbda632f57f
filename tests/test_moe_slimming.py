"""MoE-Slimming: scores equal those of the official code, and add up to what an allocator reads."""

import pytest
import torch

from flexmoe.around import Reads, around_experts
from flexmoe.experts import expert_layers
from flexmoe.methods.moe_slimming import activity, attribution, layer_loss
from flexmoe.methods.moe_slimming_saliency import contributed, gradient, saliency, slopes
from flexmoe.methods.moe_slimming_weights import size, size_times_input
from flexmoe.observe import observe
from golden_data import golden, observed, relative, scores
from helpers import ids_of
from zoo import tiny_model

EXACT = 1e-5  # relative: sums of float32 values; seen 2e-6


def on_the_move(values, routed):
    """The official average over batches of values [E, ...]: an expert's first batch counts whole, a
    later one a tenth, one without tokens for it not at all."""
    average, seen = torch.zeros_like(values[0]).double(), torch.zeros(16, dtype=torch.bool)
    for value, routed_E in zip(values, routed, strict=True):
        later = torch.where(shaped(seen, value), 0.9 * average + 0.1 * value, value.double())
        average = torch.where(shaped(routed_E, value), later, average)
        seen = seen | routed_E
    return average


def shaped(flag_E, like):
    return flag_E.view(-1, *[1] * (like.dim() - 1))


def by_batch(method, criterion):
    """The official average over four batches of ``criterion`` (of a layer and its statistics), over
    its mean, by layer; and the official numbers."""
    model, ids, want = golden("qwen3moe", "moe_slimming")
    batches = [scores(model, batch, method)[1] for batch in ids.split(4)]
    found = {}
    for layer in expert_layers(model):
        stats = [statistics[layer.index] for statistics in batches]
        values = [criterion(layer, one) for one in stats]
        average = on_the_move(values, [one["count_E"] > 0 for one in stats])
        found[layer.index] = average / average.mean()
    return found, want


ENDS = ("_EI", "_up_EI", "_gate_EI")
SIDES = ("activation2_EI", "up2_EI", "gate2_EI")


def mean_size(stats, end):
    return stats[f"flow{end}"] / stats["count_E"].clamp_min(1)[:, None]


def input_by_weights(layer, stats):
    """By a loop over experts and matrices."""
    x_EH, h_EI = stats["input2_EH"].sqrt(), stats["activation2_EI"].sqrt()
    weights = layer.module.gate_up_proj.detach().double().abs()
    down = layer.module.down_proj.detach().double().abs()
    rows = []
    for e in range(16):
        gate, up = (weights[e].split(24)[side] @ x_EH[e] for side in (0, 1))
        rows.append((gate + up + down[e].sum(0) * h_EI[e]) / 3)
    return torch.stack(rows)


# by the official name: method, the criterion of a batch as the official code averages it, and ours
CRITERIA = {
    "activation": (
        "moe-slimming",
        lambda layer, stats: sum(stats[side].sqrt() for side in SIDES) / 3,
        activity,
    ),
    "saliency": (
        "moe-slimming-saliency",
        lambda _, stats: sum(mean_size(stats, e) * stats[f"slope2{e}"].sqrt() for e in ENDS) / 3,
        saliency,
    ),
    "grad": (
        "moe-slimming-gradient",
        lambda layer, stats: sum(stats[f"slope2{end}"].sqrt() for end in ENDS) / 3,
        gradient,
    ),
    "wa": ("moe-slimming-wa", input_by_weights, size_times_input),
    "wg": (
        "moe-slimming-wg",
        lambda layer, stats: stats["weight_slope_EI"],
        lambda layer, stats: stats["weight_slope_EI"] / stats["weight_slope_EI"].mean(),
    ),
    "weight": (
        "moe-slimming-weight",
        lambda layer, stats: size(layer),
        lambda layer, _: size(layer),
    ),
}


@pytest.mark.parametrize("official", CRITERIA)
def test_criteria_equal_official_code(official):
    """The official code takes a moving average over batches: it follows from ours of each batch."""
    method, of_batch, ours = CRITERIA[official]
    found, want = by_batch(method, of_batch)
    for i, average in found.items():
        assert relative(average, want[f"layer.{i}.{official}"].double()) < 1e-4
    model, ids, _ = golden("qwen3moe", "moe_slimming")
    got, statistics = scores(model, ids[:4], method)
    for layer in expert_layers(model):
        stats = statistics[layer.index]
        value = of_batch(layer, stats)
        assert torch.allclose(ours(layer, stats), value / value.mean())
        share = got[layer.index] / got[layer.index].sum(1, keepdim=True)
        assert torch.allclose(share, value / value.sum(1, keepdim=True))


def test_the_loss_of_the_local_problem_and_usage_equal_official_code():
    model, ids, want = golden("qwen3moe", "moe_slimming")
    for i, stats in scores(model, ids, "moe-slimming")[1].items():
        loss = float(layer_loss(stats)) / 16  # the official one is per sample
        assert loss == pytest.approx(float(want["layer_loss"][i]), rel=EXACT)
    batches = [observe(model, batch, ["count_E"]) for batch in ids.split(4)]
    for i in batches[0]:
        count = [found[i]["count_E"] for found in batches]
        share_E = on_the_move(
            [c / found[i].tokens for c, found in zip(count, batches, strict=True)],
            [c > 0 for c in count],
        )
        assert relative(share_E, want[f"layer.{i}.usage"].double()) < EXACT


def test_contributions_equal_official_code():
    """Ours add up what the official code averages after it has clipped each channel at its 99 %
    quantile over the batch's tokens; dividing by its negative mean turns the sign there."""
    model, ids, want = golden("qwen3moe", "moe_slimming")
    clipped = {layer.index: [] for layer in expert_layers(model)}
    routed = {layer.index: [] for layer in expert_layers(model)}
    ours = {layer.index: torch.zeros(16, 24) for layer in expert_layers(model)}

    def look(pairs):
        mean_EI = torch.zeros(16, 24)
        values = [pairs.h_SI, pairs.pre_SI[1], pairs.pre_SI[0]]
        for value, slope in zip(values, slopes(pairs), strict=True):
            for e, a, b in pairs.all.routing.segments:
                adds = value[a:b] * slope[a:b]
                ours[pairs.layer.index][e] -= adds.sum(0) / 3
                most = adds.abs().quantile(0.99, dim=0)
                mean_EI[e] += adds.clamp(-most, most).mean(0) / 3
        clipped[pairs.layer.index].append(mean_EI)
        routed[pairs.layer.index].append(mean_EI.any(1))
        return torch.zeros_like(pairs.weight_S)

    found = observed(model, ids, look, "contribution_EI", reads=("residual",))
    for i, stats in found.items():
        assert len(clipped[i]) == 4
        average = on_the_move(clipped[i], routed[i])
        assert close_to_mean(average / average.mean(), want[f"layer.{i}.token_contrib"]) < 1e-4
        assert close_to_mean(contributed(stats) * stats["count_E"][:, None], ours[i]) < 1e-4


def close_to_mean(got, want):
    """The largest difference over the mean size: single values lie next to 0."""
    return float((got - want).abs().max() / want.abs().mean())


def test_a_negative_contribution_goes_first():
    model, ids, _ = golden("qwen3moe", "moe_slimming")
    got, statistics = scores(model, ids, "moe-slimming-contribution")
    for i, score in got.items():
        value = contributed(statistics[i])
        assert (value < 0).any() and torch.equal(score < 0, value < 0)
        assert torch.equal(score.argsort(1), value.argsort(1))


def test_moe_slimmings_attribution_equals_official_code():
    """What a token adds to our sums is what it adds to the official mean, which clips each hidden
    dimension at its 99 % quantile and averages batches on the move."""
    model, ids, want = golden("qwen3moe", "moe_slimming")
    average = {layer.index: [None] * 16 for layer in expert_layers(model)}
    ours = {layer.index: torch.zeros(16) for layer in expert_layers(model)}

    def look(pairs):
        i, out, T = pairs.layer.index, pairs.all.out_TH, len(pairs.all.out_TH)
        behind = (pairs.residual_TH + out).square().sum(1, keepdim=True) + 1e-6
        slope = (-2 * (1 - 0.9) * out / behind)[pairs.token_S] * pairs.weight_S[:, None]
        for e, a, b in pairs.all.routing.segments:
            adds = 0.9 * pairs.y_SH[a:b] * slope[a:b]
            ours[i][e] -= float(adds.sum())
            most = adds.abs().quantile(0.99, dim=0)
            here = float(adds.clamp(-most, most).mean(0).sum()) * (b - a) / T
            old = average[i][e]
            average[i][e] = here if old is None else 0.9 * old + 0.1 * here
        return pairs.weight_S

    found = observed(model, ids, look, "part_E", reads=("residual",))
    for i, stats in found.items():
        official = want[f"layer.{i}.expert_out_token_contrib"]
        assert relative(torch.tensor(average[i]), official) < EXACT
        assert relative(attribution(stats) * stats.tokens, ours[i].double()) < EXACT


def test_moe_slimmings_scores_add_up_to_the_weights_of_experts_and_layers():
    model, ids, _ = golden("qwen3moe_cold", "reap")
    got, statistics = scores(model, ids, "moe-slimming")
    for layer in expert_layers(model):
        score, stats = got[layer.index], statistics[layer.index]
        assert float(score.sum()) == pytest.approx(float(layer_loss(stats)))
        weight = attribution(stats).clamp_min(0).sqrt()
        assert torch.allclose(score.sum(1) / score.sum(), weight / weight.sum())
        assert (
            torch.equal(score.argsort(1), activity(layer, stats).argsort(1))
            or (stats["count_E"] == 0).any()
        )


@pytest.mark.parametrize("kind", ["gpt_oss", "nemotron_h", "qwen3_moe"])
def test_gradients_of_the_local_problem_are_those_of_autograd(kind):
    """Of the weights, also transposed, interleaved, with biases, or without a gate."""
    model = tiny_model(kind)
    ids, layers = ids_of(model), expert_layers(model)
    stats = observe(model, ids, ["weight_slope_EI"])[layers[0].index]
    layer, seen = layers[0], {}

    def look(module, args, out):
        x_TH = args[0].flatten(0, -2)
        seen["args"], seen["residual"] = args, around[layer.index].residual_TH(x_TH)

    handle = layer.module.register_forward_hook(look)
    with torch.no_grad(), around_experts(layers, [Reads(("residual",))]) as around:
        model(ids, use_cache=False)
    handle.remove()
    for parameter in layer.module.parameters():
        parameter.requires_grad_(True)
    out_TH = layer.module(*seen["args"]).flatten(0, -2)
    behind_TH = (seen["residual"] + out_TH).detach()
    off_T = (seen["residual"] + 0.9 * out_TH - behind_TH).square().sum(1)
    (off_T / (behind_TH.square().sum(1) + 1e-6)).sum().backward()
    products = [
        (weight * grad).abs().sum(2)
        for name, parameter in layer.parameters.items()
        if parameter.dim() == 3
        for weight, grad in zip(
            layer.channel_major(name, parameter),
            layer.channel_major(name, parameter.grad),
            strict=True,
        )
    ]
    want_EI = torch.stack(products).mean(0).detach()
    assert close_to_mean(stats["weight_slope_EI"], want_EI) < 1e-4
