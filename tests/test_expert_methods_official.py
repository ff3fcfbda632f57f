"""Scores of whole experts equal those of the official code."""

import pytest
import torch

from flexmoe.around import router_weights
from flexmoe.experts import expert_layers
from flexmoe.observe import observe
from golden_data import golden, golden_logits, relative, scores

EXACT = 1e-5  # relative: sums of float32 values; seen 7e-7


@pytest.mark.parametrize("model_name", ["qwen3moe", "qwen3moe_cold"])
@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        ("reap", "reap"),
        ("ean", "ean_sum"),
        ("man", "ean_mean"),
        ("seer", "weighted_expert_frequency_sum"),
        ("frequency", "frequency"),
        ("max-activation", "max_activations"),
    ],
)
def test_scores_equal_reaps_official_code(model_name, name, criterion):
    """Also the sets kept at 25 and 50 %. (Nothing is kept by the largest activation there.)"""
    model, ids, want = golden(model_name, "reap")
    got, _ = scores(model, ids, name)
    for i, score in got.items():
        official = want[f"layer.{i}.{criterion}"].double()
        assert relative(score, official) < EXACT
        for share in (25, 50):
            kept = want.get(f"layer.{i}.keep.{criterion}.r{share}")
            if kept is not None:
                best = score.topk(len(kept)).indices.sort().values
                assert torch.equal(best, kept)
    assert len(got) == len([key for key in want if key.endswith(f".{criterion}")])


@pytest.mark.parametrize("model_name", ["qwen3moe", "qwen3moe_cold"])
def test_reaps_sums_equal_official_code(model_name):
    """What its mean is taken of is a criterion of its own there."""
    model, ids, want = golden(model_name, "reap")
    for i, stats in scores(model, ids, "reap")[1].items():
        sum_E = stats["weighted_norm_E"]
        assert relative(sum_E, want[f"layer.{i}.weighted_ean_sum"].double()) < EXACT
        for share in (25, 50):
            kept = want[f"layer.{i}.keep.weighted_ean_sum.r{share}"]
            assert torch.equal(sum_E.topk(len(kept)).indices.sort().values, kept)


def test_reap_prunes_to_the_official_logits():
    """The least of half the experts removed with their router rows, as the official code does."""
    model, ids, _ = golden("qwen3moe", "reap")
    got, _ = scores(model, ids, "reap")
    for layer in expert_layers(model):
        kept = got[layer.index].topk(8).indices.sort().values
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.module, name)
            setattr(layer.module, name, torch.nn.Parameter(weight[kept]))
        layer.module.num_experts = 8
        (name,) = router_weights(layer)
        router = model.get_submodule(name.rpartition(".")[0])
        router.weight = torch.nn.Parameter(router.weight[kept])
    with torch.no_grad():
        logits = model(ids).logits
    assert float((logits - golden_logits("reap.r50.qwen3moe")).abs().max()) < 1e-5


@pytest.mark.parametrize("model_name", ["qwen3moe", "olmoe"])
def test_aimer_equals_official_code(model_name):
    model, ids, want = golden(model_name, "aimer")
    got, _ = scores(model, ids, "aimer")
    for i, score in got.items():
        assert relative(-score, want[f"layer.{i}.score"].double()) < EXACT
        for share in (25, 50):
            kept = want[f"layer.{i}.keep.r{share}"]
            assert torch.equal(score.topk(len(kept)).indices.sort().values, kept)


def test_mone_equals_official_code():
    """Means and usage at once. The official variance is a running one over batches that leaves out
    the first (golden README): it follows from our sums of each batch. Ours, over all tokens, keeps
    the same experts."""
    model, ids, want = golden("olmoe", "mone")
    got, whole = scores(model, ids, "mone")
    needs = ("weight_E", "output_EH", "output2_EH")
    batches = [observe(model, batch, needs) for batch in ids.split(4)]
    for i, score in got.items():
        mine = f"layer.{i}."
        official = {k.removeprefix(mine): v for k, v in want.items() if k.startswith(mine)}
        stats = whole[i]
        mean_EH = stats["output_EH"] / stats["count_E"][:, None]
        assert torch.equal(stats["count_E"].long(), official["num_tokens"])
        scale = official["mean_out"].double().norm(dim=1, keepdim=True)
        assert ((mean_EH - official["mean_out"]).abs() / scale).max() < EXACT
        usage_E = stats["weight_E"] / stats.tokens
        assert relative(usage_E, official["routing_score"].double()) < EXACT
        for share in (25, 50):
            kept = official[f"keep.r{share}"]
            assert torch.equal(score.topk(len(kept)).indices.sort().values, kept)
            gone = official[f"removed.r{share}"]
            assert sorted([*kept.tolist(), *gone.tolist()]) == list(range(16))
            novice = official[f"novice.r{share}"].double()  # kept in bfloat16
            assert torch.allclose(mean_EH[gone], novice, rtol=2**-8)
        seen, mean, spread = torch.zeros(16, 1), torch.zeros(16, 32), torch.zeros(16, 32)
        for batch in batches:
            n, total = batch[i]["count_E"][:, None], batch[i]["output_EH"]
            both = (seen + n).clamp_min(1)
            mean = mean * seen / both + total / both
            around = batch[i]["output2_EH"] - 2 * mean * total + n * mean.square()
            later = spread * (seen - 1) / (both - 1).clamp_min(1) + around / both
            spread = torch.where(seen > 0, torch.where(n > 0, later, spread), spread)
            seen = seen + n
        fusion = 0.25 * spread.sum(1).sqrt() * usage_E
        assert relative(spread, official["fluc_out"].double()) < 1e-4
        assert relative(fusion, official["score"].double()) < EXACT
