"""Run-time policies: what each computes, what is saved, what is refused."""

import itertools
import json

import pytest
import torch
from typer.testing import CliRunner

import flexmoe
from flexmoe import FlexmoeError
from flexmoe.around import router_weights
from flexmoe.cli import app
from flexmoe.evaluation.compared import compare
from flexmoe.evaluation.inputs import EvaluateConfig
from flexmoe.evaluation.members import How
from flexmoe.experts import expert_layers
from flexmoe.family import attach, set_budget
from flexmoe.headers import resolve
from flexmoe.policies import Batch, Fitted, LayerFacts, all_policies, parse, routing_weights, stop
from flexmoe.policies.lexi import search, sensitivity
from flexmoe.policies.naee_skip import thresholds
from flexmoe.routing.edits import Routed
from helpers import LOGIT_TOLERANCE, difference, ids_of, logits
from test_router_rules import expert_plan
from zoo import model_class, tiny_config, tiny_model

E = 8
INDEX = torch.tensor([[5, 0, 3], [0, 1, 2], [7, 6, 0]])
WEIGHT = torch.tensor([[0.2, 0.7, 0.1], [0.4, 0.35, 0.25], [0.1, 0.1, 0.8]])


def facts(weight_NK=WEIGHT, sequences=1):
    return LayerFacts(None, weight_NK.sort(1, descending=True).values, Batch(sequences))


def skipped(name, number, weight_TK=WEIGHT, sequences=1):
    """Which pairs a policy leaves out, and the weights of the others."""
    known = facts(weight_TK, sequences)
    done = all_policies()[name].rule(Routed(INDEX, weight_TK, E), known, number)
    gone = done.index_TK == E
    assert torch.equal(done.index_TK[~gone], INDEX[~gone])
    return gone.int().tolist(), done.weight_TK.masked_fill(gone, 0)


def test_halving_keeps_the_best_and_the_weights_of_all():
    gone, weight = skipped("halve", 2)
    assert gone == [[0, 0, 1], [0, 0, 1], [0, 1, 0]]
    assert torch.equal(weight, WEIGHT * (1 - torch.tensor(gone)))


@pytest.mark.parametrize("kind", ["qwen3_moe", "deepseek_v3", "mixtral"])
def test_halving_over_another_set(kind):
    """Weights over more experts than are used: p of those computed over the p of the largest."""
    model, ids = tiny_model(kind), ids_of(tiny_model(kind))
    K, E = fewer_of(model)
    plain, wide = Fitted(*parse("halve:1"), ids), Fitted(*parse(f"halve:1/{E}"), ids)
    plain.use(model)
    halved = logits(model, ids)
    Fitted(*parse(f"halve:1/{K}"), ids).use(model)
    assert difference(logits(model, ids), halved) < LOGIT_TOLERANCE  # the default's own set
    layer, seen = expert_layers(model)[0], []
    wide.use(model)
    edit = layer.module.flexmoe_policy
    layer.module.flexmoe_policy = lambda routed: seen.append((routed, edit(routed))) or seen[-1][1]
    router = router_weights(layer)
    name = next(iter(router)).rpartition(".")[0]
    said = []
    model.get_submodule(name).register_forward_hook(lambda m, a, out: said.append(out[0]))
    assert difference(logits(model, ids), halved) > 1e-3
    (before, after), score = seen[0], said[0].reshape(-1, E).float()
    score = score.sigmoid() if kind == "deepseek_v3" else score.softmax(1)
    mass = score.gather(1, before.index_TK).sum(1, keepdim=True) / score.sum(1, keepdim=True)
    assert torch.allclose(after.weight_TK, before.weight_TK * mass, rtol=1e-4)
    assert int((after.index_TK < E).sum()) == len(score)
    stop(model)
    with pytest.raises(FlexmoeError, match=f"more than the experts of a layer, {E}"):
        Fitted(*parse(f"halve:1/{E + 1}"), ids).use(model)
    for text in ("pesf:0.3/2", "halve:1/x", "halve:1/0"):
        with pytest.raises(FlexmoeError, match=r"takes one number|the second is how many"):
            parse(text)


def fewer_of(model):
    """Experts of a token, and of a layer."""
    K = routing_weights(model, ids_of(model))[expert_layers(model)[0].index].shape[1]
    return K, expert_layers(model)[0].E


def test_top_any_keeps_a_share_of_the_weight():
    gone, weight = skipped("top-any", 0.7)
    assert gone == [[1, 0, 1], [0, 0, 1], [1, 1, 0]]
    assert torch.allclose(weight.sum(1), torch.ones(3))  # this router normalises
    _, weight = skipped("top-any", 0.7, WEIGHT * torch.tensor([[1.0], [0.5], [0.3]]))
    assert torch.allclose(weight.sum(1), torch.tensor([0.7, 0.375, 0.24]))  # this one does not
    small = WEIGHT * torch.tensor([[0.1], [0.105], [0.11]])  # nor does this, by 5 % of its sums
    assert not facts(small).renormalises and facts(2.5 * WEIGHT).renormalises


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_kept_of_a_token_may_be_next_to_nothing(dtype):
    """What it is multiplied by then has no number in float16."""
    weight_TK = torch.tensor([[1.0, 1e-5], [1.0, 0.0]], dtype=dtype)
    routed = Routed(torch.tensor([[0, 1], [0, 1]]), weight_TK, E)
    done = facts(weight_TK.float()).keep(routed, torch.tensor([[False, True]]).expand(2, 2))
    assert done.weight_TK.dtype == dtype
    assert torch.allclose(done.weight_TK.float()[:, 1], torch.tensor([1.0, 0.0]), rtol=1e-3)


def test_skipping_by_the_ratio_to_the_largest():
    gone, _ = skipped("naee-skip", 0.6)
    assert gone == [[1, 0, 1], [0, 0, 0], [1, 1, 0]]
    two = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.5, 0.5]])
    assert thresholds([facts(two)], 0.5) == [pytest.approx(0.4 / 0.6)]  # the paper's: the median


def test_experts_that_a_sequence_hardly_uses():
    # 9 pairs of 8 experts: 1.125 on average; 0 is chosen three times, all others once
    gone, _ = skipped("pesf", 0.8)
    assert gone == [[0, 0, 0], [0, 0, 0], [0, 0, 0]]
    gone, _ = skipped("pesf", 0.95)
    assert gone == [[1, 0, 1], [0, 1, 1], [1, 1, 0]]
    gone, _ = skipped("pesf", 0.95, sequences=3)  # each of three pairs: 0.375 on average
    assert gone == [[0, 0, 0], [0, 0, 0], [0, 0, 0]]


def test_a_sequence_does_not_depend_on_its_batch():
    """Nor on the padding it takes there, on either side."""
    model, ids = tiny_model("qwen3_moe"), ids_of(tiny_model("qwen3_moe"))
    Fitted(*parse("pesf:0.9"), ids).use(model)
    together = logits(model, ids)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, together)  # not by name
    for n in range(2):
        assert difference(together[n : n + 1], logits(model, ids[n : n + 1])) < LOGIT_TOLERANCE
    for sides in ((0, 20), (20, 0)):
        padded, real = (torch.nn.functional.pad(t, sides) for t in (ids, torch.ones_like(ids)))
        with torch.no_grad():
            found = model(
                input_ids=padded,
                attention_mask=real,
                position_ids=(real.cumsum(1) - 1).clamp_min(0),
            ).logits
        assert difference(found[real.bool()].view_as(together), together) < LOGIT_TOLERANCE
    stop(model)
    assert difference(together, logits(model, ids)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normalised", [True, False])
def test_a_router_that_normalises_is_known_in_any_dtype(dtype, normalised):
    """What is rounded to bfloat16 comes to the same sum but for its rounding."""
    model = fewer("qwen3_moe", 2, norm_topk_prob=normalised)[1].to(dtype)
    ids = torch.randint(3, 60, (16, 32), generator=torch.Generator().manual_seed(0))
    for layer in expert_layers(model):
        known = LayerFacts(layer, routing_weights(model, ids)[layer.index], Batch())
        assert known.renormalises == normalised


def fewer(kind, k, **settings):
    """The model whose router picks k experts a token, and one that picks all it has."""
    models = []
    for number in (k, 4):
        config = tiny_config(kind)
        config.num_experts_per_tok = number
        for name, value in settings.items():
            setattr(config, name, value)
        torch.manual_seed(0)
        models.append(model_class(kind)(config).float().eval())
        with torch.no_grad():
            for parameter in models[-1].parameters():
                parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.fill_(1.0)
    return models


@pytest.mark.parametrize("normalised", [True, False])
def test_lexi_is_a_smaller_top_k_in_each_layer(normalised):
    small, full = fewer("qwen3_moe", 2, norm_topk_prob=normalised)
    ids = ids_of(full)
    fitted = Fitted(*parse("lexi:2"), ids)
    fitted.use(full)
    assert sum(fitted.numbers.values()) == 4  # two layers, two experts on average
    fitted.numbers = dict.fromkeys(fitted.numbers, 2.0)
    fitted.use(full)
    assert difference(logits(full, ids), logits(small, ids)) < LOGIT_TOLERANCE
    works = [layer.module.flexmoe_work for layer in expert_layers(full)]
    assert all(work.pairs * 2 == work.routed for work in works)
    stop(full)


def test_sensitivity_falls_to_nothing_and_the_search_is_exact():
    model = fewer("mixtral", 2)[1]
    ids = ids_of(model)
    weight = routing_weights(model, ids)
    for layer in expert_layers(model):
        known = LayerFacts(layer, weight[layer.index], Batch())
        assert known.K == 4 and known.renormalises  # a Mixtral always normalises
        cost_K = sensitivity(known)
        assert torch.equal(cost_K, sensitivity(known))
        assert (cost_K.diff() < 0).all() and cost_K[-1] < 1e-5 * cost_K[0]
    generator = torch.Generator().manual_seed(0)
    cost_LK = torch.rand(3, 4, generator=generator, dtype=torch.float64)
    for total in range(3, 13):
        choices = [c for c in itertools.product(range(1, 5), repeat=3) if sum(c) == total]
        best = min(sum(cost_LK[i, k - 1] for i, k in enumerate(c)) for c in choices)
        found = search(cost_LK, total)
        assert sum(found) == total
        assert sum(cost_LK[i, k - 1] for i, k in enumerate(found)) == pytest.approx(float(best))


def test_what_is_no_policy_is_refused():
    for text, why in {
        "halv:2": "Did you mean 'halve'",
        "halve": "needs a number: halve:NUMBER",
        "top-any:1.5": "a number between 0 and 1",
        "top-any:x": "a number between 0 and 1",
        "lexi:0.5": "a number between",
    }.items():
        with pytest.raises(FlexmoeError, match=why):
            parse(text)
    model = flexmoe.load("tiny")
    for text, why in {"halve:4": "sent to 4 experts", "halve:1.5": "a whole number"}.items():
        with pytest.raises(FlexmoeError, match=why):
            Fitted(*parse(text), ids_of(model)).use(model)
    with pytest.raises(FlexmoeError, match="--policy-data has no effect without --policy"):
        EvaluateConfig(policy_data="x.txt")
    with pytest.raises(FlexmoeError, match="--save keeps the curve of the family as it is"):
        EvaluateConfig(policy="pesf", save=True)


def test_on_the_command_line(tmp_path):
    out = tmp_path / "out.json"
    small = f"--data books.valid --samples 3 --seq-len 32 --json {out}"
    result = CliRunner().invoke(app, f"eval tiny --policy halve:2 {small}".split())
    assert result.exit_code == 0, result.output
    assert "no policy" in result.output and "what is computed" in result.output
    found = json.loads(out.read_text())
    (row,) = found["budgets"]
    assert found["policy"] == "halve:2" and row["work"] == {"pairs": 0.5, "channels": 0.5}
    assert row["increase"] > 0 and found["against"]["nll"] < row["nll"]
    result = CliRunner().invoke(app, ["policies"])
    for name in ("halve", "lexi", "naee-skip[:0.5]", "pesf[:0.3]", "top-any"):
        assert name in result.output.replace("\n", "")


def test_a_policy_goes_with_budgets_and_router_rules(tmp_path):
    from flexmoe import CompressConfig, compress

    config = CompressConfig(method="reap", pruned=(0.5,), samples=4, seq_len=64)
    compress("tiny", tmp_path / "family", config)
    out = tmp_path / "out.json"
    common = f"--data books.valid --samples 3 --seq-len 32 --json {out}"
    rows = {}
    for options in ("--policy halve:2", "--router remove", "--router remove --policy halve:2"):
        command = f"eval {tmp_path / 'family'} {options} {common}"
        result = CliRunner().invoke(app, command.split())
        assert result.exit_code == 0, result.output
        rows[options] = json.loads(out.read_text())["budgets"][-1]
    assert rows["--policy halve:2"]["work"]["pairs"] < 0.5  # some go to experts that are gone
    assert rows["--router remove"]["work"]["pairs"] == 1
    assert rows["--router remove --policy halve:2"]["work"] == {"pairs": 0.5, "channels": 0.5}
    assert len({row["nll"] for row in rows.values()}) == 3


@pytest.mark.parametrize("first", [0.0, 0.5])
def test_a_policy_is_fitted_on_the_unpruned_model(first):
    model, ids = tiny_model("qwen3_moe"), ids_of(tiny_model("qwen3_moe"))
    fresh = Fitted(*parse("naee-skip"), ids)
    fresh.fit(model)
    attach(model, expert_plan(model, "base", router="remove"), ranked=True)
    set_budget(model, first)
    fitted = Fitted(*parse("naee-skip"), ids)
    How(policy=fitted).set(model, 0.5)
    assert fitted.numbers == fresh.numbers
    assert expert_layers(model)[0].module.flexmoe_renumber is not None  # the rule is on again


def test_a_second_number_is_refused_where_the_router_forgets(tmp_path):
    model = flexmoe.load("tiny")
    expert_plan(model, resolve("tiny"), router="remove").save(tmp_path)
    with pytest.raises(FlexmoeError, match="give one number, or --router keep"):
        compare(tmp_path, policy="halve:2/4")


def test_a_policy_leaves_nothing_behind():
    model = tiny_model("qwen3_moe")
    ids, before = ids_of(model), len(model._forward_pre_hooks)
    first, second = Fitted(*parse("pesf:0.9"), ids), Fitted(*parse("top-any:0.7"), ids)
    for fitted in (first, second, first, first):
        fitted.use(model)
        assert len(model._forward_pre_hooks) == before + 1
    logits(model, ids)
    assert first.batch.sequences == 2 and second.batch.sequences == 1  # the one that is on is told
    stop(model)
    assert len(model._forward_pre_hooks) == before and not hasattr(model, "flexmoe_policy_hooks")


def test_a_policy_on_a_ragged_export_is_refused(tmp_path):
    from flexmoe import CompressConfig, compress, export

    config = CompressConfig(method="magnitude", pruned=(0.4,))
    compress("tiny", tmp_path / "family", config)
    export(tmp_path / "family", tmp_path / "ragged", pruned=0.4, layout="ragged")
    with pytest.raises(FlexmoeError, match=r"is of a ragged export.*Use the family"):
        Fitted(*parse("halve:2"), torch.ones(1, 4, dtype=torch.long)).use(
            flexmoe.load(tmp_path / "ragged")
        )
