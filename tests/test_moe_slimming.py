"""MoE-Slimming: scores equal those of the official code, and add up to what an allocator reads."""

import pytest
import torch

from flexmoe.experts import expert_layers
from flexmoe.methods.moe_slimming import activity, attribution, layer_loss
from flexmoe.methods.moe_slimming_saliency import saliency
from flexmoe.statistics import STATISTICS, observe, statistic
from golden_data import golden, relative, scores

EXACT = 1e-5  # relative: sums of float32 values; seen 2e-6


def test_moe_slimming_equals_official_code():
    """The official code takes a moving average over batches: it follows from ours of each batch."""
    model, ids, want = golden("qwen3moe", "moe_slimming")
    batches = [scores(model, batch, "moe-slimming") for batch in ids.split(4)]
    whole, layers = scores(model, ids, "moe-slimming")[1], expert_layers(model)
    for layer in layers:
        i, average = layer.index, torch.zeros(16, 24, dtype=torch.float64)
        seen = torch.zeros(16, 1, dtype=torch.bool)
        for _, statistics in batches:
            stats = statistics[i]
            here = sum(stats[f"{n}2_EI"].sqrt() for n in ("activation", "up", "gate")) / 3
            assert torch.allclose(activity(layer, stats), here / here.mean())
            routed = stats["count_E"][:, None] > 0
            later = torch.where(seen, 0.9 * average + 0.1 * here, here)
            average, seen = torch.where(routed, later, average), seen | routed
        official = want[f"layer.{i}.activation"].double()
        assert relative(average / average.mean(), official) < 1e-4
        loss = float(layer_loss(whole[i])) / 16  # the official one is per sample
        assert loss == pytest.approx(float(want["layer_loss"][i]), rel=EXACT)


def test_moe_slimmings_saliency_equals_official_code():
    """As above; also its criterion of gradients alone."""
    model, ids, want = golden("qwen3moe", "moe_slimming")
    name, ends = "moe-slimming-saliency", ("_EI", "_up_EI", "_gate_EI")
    batches = [scores(model, batch, name)[1] for batch in ids.split(4)]
    for layer in expert_layers(model):
        i = layer.index
        average = {kind: torch.zeros(16, 24, dtype=torch.float64) for kind in ("saliency", "grad")}
        seen = torch.zeros(16, 1, dtype=torch.bool)
        for statistics in batches:
            stats = statistics[i]
            routed = stats["count_E"][:, None] > 0
            norms = [stats[f"slope2{end}"].sqrt() for end in ends]
            sizes = [stats[f"flow{end}"] / stats["count_E"].clamp_min(1)[:, None] for end in ends]
            here = {
                "saliency": sum(a * b for a, b in zip(sizes, norms, strict=True)) / 3,
                "grad": sum(norms) / 3,
            }
            mean = here["saliency"] / here["saliency"].mean()
            assert torch.allclose(saliency(layer, stats), mean)
            for kind, value in here.items():
                later = torch.where(seen, 0.9 * average[kind] + 0.1 * value, value)
                average[kind] = torch.where(routed, later, average[kind])
            seen = seen | routed
        for kind, value in average.items():
            assert relative(value / value.mean(), want[f"layer.{i}.{kind}"].double()) < 1e-4


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

    statistic("look_E", when="forward", reads=("residual",))(look)
    try:
        found = observe(model, ids, ("look_E", "part_E"), batch_size=4)
    finally:
        STATISTICS.pop("look_E")
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
