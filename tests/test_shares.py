"""Allocators of published methods against what their papers say, worked out for one budget."""

import math

import torch

from flexmoe.allocate import allocate
from flexmoe.experts import LayerShape


def drawn(experts, channels, layers, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = {i: LayerShape(experts, channels, 4, 12, 0) for i in range(layers)}
    score = {
        i: torch.rand(experts, channels, generator=generator, dtype=torch.float64) for i in shapes
    }
    return shapes, score


def test_logistic_is_seaps_curve_over_depth():
    shapes, score = drawn(2, 500, 5)
    width = allocate("logistic", shapes, score, [0.4], 1)
    gone = [1 - int(width[i][0].sum()) / 1000 for i in shapes]
    curve = [1 / (1 + math.exp(-(i / 4 - 0.3))) for i in shapes]
    for share, height in zip(gone, curve, strict=True):
        assert abs(share - 0.4 * 5 / sum(curve) * height) < 2e-3
    best = score[0].flatten().topk(int(width[0][0].sum())).indices  # the layer's best stay
    assert torch.equal(torch.bincount(best // 500), width[0][0].long())


def test_trapezoid_has_more_whole_experts_in_deep_layers_and_one_width_for_the_others():
    shapes, score = drawn(24, 100, 3)  # 20 would have half an expert at 70 %
    for i in score:
        score[i] += torch.randperm(24, generator=torch.Generator().manual_seed(i))[:, None]
    for pruned, share in ((0.4, 0.25), (0.7, 0.05)):  # what the paper says of these two budgets
        width = allocate("trapezoid", shapes, score, [pruned], 1)
        whole = [(width[i][0] == 100).nonzero()[:, 0] for i in shapes]
        assert all(
            abs(len(w) - 24 * share * c) <= 0.5 for w, c in zip(whole, (0.5, 1, 1.5), strict=True)
        )
        slim = torch.cat([width[i][0][width[i][0] < 100] for i in shapes])
        wanted = (72 * (1 - pruned) - sum(map(len, whole))) / (72 - sum(map(len, whole)))
        assert (slim / 100 - wanted).abs().max() < 0.03
        for i, kept in enumerate(whole):
            assert set(kept.tolist()) == set(score[i].sum(1).topk(len(kept)).indices.tolist())


def fewest(score, share):
    """The fewest values that come to a share of the sum."""
    ranked = score.flatten().sort(descending=True).values
    return int((ranked.cumsum(0) < share * ranked.sum() - 1e-12).sum()) + 1


def test_coverage_is_moe_slimmings_nested_bisection():
    shapes, score = drawn(6, 50, 3, seed=1)
    for i in score:
        weight_E = torch.rand(6, generator=torch.Generator().manual_seed(i)).double()
        score[i] = score[i] / score[i].sum(1, keepdim=True) * (weight_E / weight_E.sum())[:, None]
        score[i] *= 0.1 + i**2
    total = torch.tensor([float(score[i].sum()) for i in score]).double().sqrt()
    spread = float(total.std(correction=0))
    total = total.clamp(float(total.mean()) - spread, float(total.mean()) + spread)
    total /= total.mean()
    width = allocate("coverage", shapes, score, [0.5], 1)
    low, high = 0.0, 2.0  # the share of each layer's total, times its weight
    for _ in range(60):
        middle = (low + high) / 2
        counts = [fewest(score[i], min(1, middle * float(total[i]))) for i in score]
        low, high = (middle, high) if sum(counts) < 450 else (low, middle)
    for i, count in zip(score, counts, strict=True):
        assert abs(int(width[i][0].sum()) - count) <= 1
        least, most = 0.0, 1e3  # the share of each expert's total, times its weight
        for _ in range(80):
            m = (least + most) / 2
            weight = score[i].sum(1) / score[i].sum()
            kept = [fewest(s, min(1, m * float(w))) for s, w in zip(score[i], weight, strict=True)]
            least, most = (m, most) if sum(kept) < count else (least, m)
        assert (width[i][0] - torch.tensor(kept)).abs().max() <= 1
