"""Scores of whole experts equal the paper's formula in a loop."""

import pytest
import torch

from flexmoe.around import router_weights
from flexmoe.experts import expert_layers
from flexmoe.grouping import STAYS, absorbed
from flexmoe.observe import observe
from golden_data import golden, scores
from helpers import ids_of
from zoo import tiny_model


@pytest.fixture(scope="module")
def tokens():
    """Every token of two sequences at every layer of a Qwen3-MoE, worked out expert by expert:
    residual stream, router logits, and (expert, weight, activation, output) of its experts."""
    model, ids, _ = golden("qwen3moe", "reap")
    ids, seen = ids[:2], {}
    for i, decoder in enumerate(model.model.layers):
        norm, mlp = decoder.post_attention_layernorm, decoder.mlp

        def before(module, args, i=i):
            seen[i] = {"residual": args[0].detach().flatten(0, 1)}

        def after(module, args, out, i=i):
            seen[i]["x"] = out.detach().flatten(0, 1)

        norm.register_forward_pre_hook(before)
        norm.register_forward_hook(after)
    with torch.no_grad():
        model(ids)
        found = {}
        for i, decoder in enumerate(model.model.layers):
            mlp, found[i] = decoder.mlp, []
            for residual, x in zip(seen[i]["residual"], seen[i]["x"], strict=True):
                logits = mlp.gate.weight @ x
                weight, chosen = logits.softmax(0).topk(4)
                routed = []
                for e, w in zip(chosen.tolist(), (weight / weight.sum()).tolist(), strict=True):
                    gate, up = (mlp.experts.gate_up_proj[e] @ x).chunk(2)
                    h = torch.nn.functional.silu(gate) * up
                    routed.append((e, w, h, mlp.experts.down_proj[e] @ h))
                found[i].append({"residual": residual, "x": x, "logits": logits, "routed": routed})
    return model, ids, found


def added_up(token_list, value):
    """Sums [E] of what ``value(token, expert, weight, activation, output)`` gives."""
    total = torch.zeros(16, dtype=torch.float64)
    for token in token_list:
        for e, w, h, f in token["routed"]:
            total[e] += float(value(token, e, w, h, f))
    return total


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=0)


def turned(token):
    moved = token["residual"] + sum(w * f for _, w, _, f in token["routed"])
    return 1 - cosine(token["residual"], moved)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("msan", lambda token, e, w, h, f: f.norm() ** 2),
        ("easy-ep", lambda token, e, w, h, f: w * f.norm() * turned(token)),
        ("tenp-experts", lambda token, e, w, h, f: w * f.norm() * (1 - cosine(token["x"], f))),
    ],
)
def test_scores_of_outputs_equal_the_papers_formula(tokens, name, value):
    model, ids, found = tokens
    got, statistics = scores(model, ids, name)
    for i, score in got.items():
        want = added_up(found[i], value)
        if name == "msan":
            want /= statistics[i]["count_E"].clamp_min(1)
        # the cosine is near 1, and 1 - cosine keeps fewer digits
        assert torch.allclose(score, want, rtol=1e-4, atol=1e-9)


def test_premoe_scores_equal_the_papers_formulas(tokens):
    model, ids, found = tokens
    tcess, peu = scores(model, ids, "tcess")[0], scores(model, ids, "peu")[0]
    for i, seen in found.items():
        first, second = torch.zeros(2, 16, dtype=torch.float64)
        pools = [token["logits"].topk(4) for token in seen]
        sure = sum(float(pool.values.softmax(0).max()) for pool in pools) / len(pools)
        for pool in pools:
            first[pool.indices[0]] += float(pool.values[0]) / len(pools)
            for logit, share, e in zip(
                *pool[:1], pool.values.softmax(0), pool.indices, strict=True
            ):
                if share >= sure:
                    second[e] += max(float(logit), float(logit.sigmoid())) / len(pools)
        assert torch.allclose(tcess[i], first, rtol=1e-5, atol=1e-9)
        assert torch.allclose(peu[i], second, rtol=1e-5, atol=1e-9)


def test_seap_equals_the_papers_formula(tokens):
    """Variance of a channel over the tokens of its expert x squared norm of its down column."""
    model, ids, found = tokens
    got, _ = scores(model, ids, "seap")
    for i, seen in found.items():
        for e in range(16):
            h = [h for token in seen for expert, _, h, _ in token["routed"] if expert == e]
            down = model.model.layers[i].mlp.experts.down_proj[e]
            want = torch.zeros(24)
            if h:
                want = torch.stack(h).var(0, unbiased=False) * down.square().sum(0)
            assert torch.allclose(got[i][e], want.detach().double(), rtol=1e-4, atol=1e-8)


def test_tenp_equals_the_papers_formulas(tokens):
    """Channels go by the mean over tokens of <h_j W_down[:, j], f> / ||f||, and the scores of an
    expert add up to its importance."""
    model, ids, found = tokens
    got, experts = scores(model, ids, "tenp")[0], scores(model, ids, "tenp-experts")[0]
    for i, seen in found.items():
        down = model.model.layers[i].mlp.experts.down_proj.detach()
        assert torch.allclose(got[i].sum(1), experts[i], rtol=1e-5)
        for e in range(16):
            parts = [
                (h * down[e]).T @ f / f.norm()
                for token in seen
                for expert, _, h, f in token["routed"]
                if expert == e
            ]
            want = torch.stack(parts).mean(0).double() if parts else torch.zeros(24).double()
            want *= experts[i][e] / want.sum().clamp_min(1e-30)
            assert torch.allclose(got[i][e], want, rtol=1e-3, atol=1e-7)


def test_tenp_of_an_expert_that_says_nothing_in_float16():
    """Its output has no direction, and float16 no number as small as what is added for that."""
    model = tiny_model("qwen3_moe").half()
    expert_layers(model)[0].module.down_proj.data[0] = 0
    found = observe(model, ids_of(model), ("projection_EI",))[0]["projection_EI"]
    assert torch.equal(found[0], torch.zeros_like(found[0])) and torch.isfinite(found).all()


def test_mc_suite_equals_the_papers_formulas(tokens):
    model, ids, found = tokens
    norm, entropy = (scores(model, ids, f"mc-{n}")[0] for n in ("norm", "entropy"))
    row = scores(model, ids, "mc-router")[0]
    for i, seen in found.items():
        want_row = model.model.layers[i].mlp.gate.weight.detach().double().norm(dim=1)
        assert torch.allclose(row[i], -want_row)
        for e in range(16):
            f = [f for token in seen for expert, _, _, f in token["routed"] if expert == e]
            if len(f) > 1:
                f_nH = torch.stack(f).detach().double()
                assert float(norm[i][e]) == pytest.approx(float(f_nH.norm(dim=0).sum()), rel=1e-5)
                want = float(f_nH.std(0).log().sum())
                assert float(entropy[i][e]) == pytest.approx(want, rel=1e-4, abs=1e-3)


def test_mc_suites_criteria_of_tokens_equal_the_papers_formulas(tokens):
    model, ids, found = tokens
    names = ("collaboration", "vocabulary", "overlap")
    got = {n: scores(model, ids, f"mc-{n}")[0] for n in names}
    for i, seen in found.items():
        sent = [{e for e, *_ in token["routed"]} for token in seen]
        words = [
            {int(t) for t, to in zip(ids.flatten(), sent, strict=True) if e in to}
            for e in range(16)
        ]
        for e in range(16):
            others = [o for o in range(16) if o != e]
            shared = max(sum({e, o} <= to for to in sent) for o in others)
            assert float(got["collaboration"][i][e]) == shared
            assert float(got["vocabulary"][i][e]) == len(words[e])
            alike = [len(words[e] & words[o]) / max(1, len(words[e] | words[o])) for o in others]
            want = -sum(alike) / 15 if words[e] else -1.0
            assert float(got["overlap"][i][e]) == pytest.approx(want)


def test_groups_are_merged_in_the_order_of_their_distance():
    """Five points on a line: 0 and 1 first, then 3 and 4 (at 10, 12), then 2 joins the nearer."""
    at = torch.tensor([0.0, 1.0, 5.0, 10.0, 12.0], dtype=torch.float64)
    distance = (at[:, None] - at).abs()
    lower = lambda members, a, b: a < b  # noqa: E731
    complete = absorbed(distance, "complete", lower)
    assert complete.tolist() == [STAYS, 1.0, 5.0, 12.0, 2.0]
    average = absorbed(distance, "average", lower)
    # {0, 1} and 5: 4.5; {0, 1, 5} and {10, 12}: (10 + 12 + 9 + 11 + 5 + 7) / 6
    assert average.tolist() == [STAYS, 1.0, 4.5, 9.0, 2.0]


def test_stun_keeps_the_member_nearest_to_the_mean():
    """By their router rows experts 0 and 1 merge first, then 2 joins them. The weights of 1 and 2
    are alike, so that 2 is nearer to the mean of the three than 0."""
    model, ids, _ = golden("qwen3moe_cold", "reap")
    layer = expert_layers(model)[0]
    (weight,) = router_weights(layer).values()
    with torch.no_grad():
        weight.copy_(100 * torch.eye(16, 32))
        weight[:3] = torch.eye(1, 32)
        weight[1, 1], weight[2, 1] = 0.1, 0.3
        for matrix in layer.parameters.values():
            matrix[0] *= 2  # of a pair both are as near to the mean: the larger one stays
            matrix[2] = matrix[1]
    got, _ = scores(model, ids[:1], "stun")
    assert got[0][:2].tolist() == pytest.approx([0.3, 0.1], rel=1e-5)
    assert float(got[0][2]) > 1 and float(got[0].max()) == STAYS


def test_uncurl_keeps_the_most_used_of_those_that_go_together(tokens):
    model, ids, found = tokens
    got, statistics = scores(model, ids, "uncurl")
    for i, seen in found.items():
        logits = torch.stack([token["logits"] for token in seen]).double()
        logits = logits - logits.mean(1, keepdim=True)
        apart = 1 - torch.nn.functional.cosine_similarity(
            logits.T[:, None], logits.T[None], dim=2
        ).fill_diagonal_(-1)
        first = float(apart.min())
        a, b = divmod(int(apart.argmin()), 16)
        count = statistics[i]["count_E"]
        goes = a if count[a] < count[b] else b
        assert float(got[i].min()) == pytest.approx(first, rel=1e-5)
        assert count[int(got[i].argmin())] == count[goes]
