"""Closed-form recovery: the formula against least squares, guarantees, layouts, memory groups."""

import dataclasses

import pytest
import torch

from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers, experts_function
from flexmoe.family import attach, set_budget
from flexmoe.refit import Moments, _pass, refit, refit_layer, solve_expert
from helpers import LOGIT_TOLERANCE, difference, logits, random_plan
from zoo import tiny_model

# gate and up concatenated; a bias, interleaved and transposed; no gate (and dense layers between)
LAYOUTS = ["mixtral", "gpt_oss", "nemotron_h"]


def made(name, tmp_path, seed=0, **settings):
    """A model with its channels in the order of a random plan, and calibration windows."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path / "base")
    plan = random_plan(model, tmp_path / "base", seed=seed, **settings)
    attach(model, plan, ranked=False)
    ids = torch.randint(3, 60, (24, 16), generator=torch.Generator().manual_seed(1))
    return model, plan, ids


def downs(model):
    """Copies of the down projections [E, I, H] of every layer."""
    return {
        layer.index: layer.channel_major("down_proj", layer.module.down_proj.data)[0].clone()
        for layer in expert_layers(model)
    }


def watch(model, ids):
    """Tokens r * h [n, I] of every layer and expert, and the full logits."""
    layers, seen = expert_layers(model), {}

    def observer(i):
        def see(routing, h_SI):
            rows = routing.split(h_SI * routing.weight_S[:, None])
            for (e, _, _), x_nI in zip(routing.segments, rows, strict=True):
                seen.setdefault((i, e), []).append(x_nI.double())
            return h_SI

        return see

    for layer in layers:
        layer.module.flexmoe_observer = observer(layer.index)
    with experts_function(model, "flexmoe_observe"):
        out = logits(model, ids)
    return {key: torch.cat(rows) for key, rows in seen.items()}, out


def errors(seen, plan, before, after):
    """Squared error of the experts' outputs [layers, B], token by token."""
    found = {i: torch.zeros(len(plan.budgets), dtype=torch.float64) for i in plan.layers}
    for (i, e), x_nI in seen.items():
        want_nH = x_nI @ before[i][e].double()
        for b, w in enumerate(plan.width[i][:, e].tolist()):
            error_nH = want_nH - x_nI[:, :w] @ after[i][e, :w].double()
            found[i][b] += error_nH.square().sum()
    return torch.stack(list(found.values()))


def test_one_budget_without_damping_is_plain_least_squares():
    generator = torch.Generator().manual_seed(0)
    x_nI = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    down_IH = torch.randn(6, 5, generator=generator).double()
    x_nI = x_nI.double()
    q_I = torch.tensor([1.0] * 4 + [0.0] * 2).double()
    change_IH = solve_expert(x_nI.mT @ x_nI, down_IH, q_I, 0.0)
    want_wH = torch.linalg.lstsq(x_nI[:, :4], x_nI @ down_IH).solution
    assert torch.allclose((down_IH + change_IH)[:4], want_wH, atol=1e-9)
    assert (change_IH[4:] == 0).all()


def test_several_budgets_are_least_squares_of_stacked_rows():
    """Prefixes of 6, 4 and 1 channels with weights 2, 1 and 3, damped towards the old weights."""
    generator = torch.Generator().manual_seed(0)
    x_nI = torch.randn(30, 6, generator=generator).double()
    down_IH = torch.randn(6, 5, generator=generator).double()
    width, p = (6, 4, 1), (2.0, 1.0, 3.0)
    rows, target = [], []
    for w, weight in zip(width, p, strict=True):
        rows.append(weight**0.5 * x_nI * (torch.arange(6) < w))
        target.append(weight**0.5 * x_nI @ down_IH)
    matrix_mI = torch.cat(rows)
    damping = 0.1 * (matrix_mI.mT @ matrix_mI).diagonal().mean()
    rows.append(damping.sqrt() * torch.eye(6).double())
    target.append(damping.sqrt() * down_IH)
    want_IH = torch.linalg.lstsq(torch.cat(rows), torch.cat(target)).solution
    q_I = sum(w * (torch.arange(6) < k) for k, w in zip(width, p, strict=True))
    change_IH = solve_expert(x_nI.mT @ x_nI, down_IH, q_I.double(), 0.1)
    assert torch.allclose(down_IH + change_IH, want_IH, atol=1e-9)


@pytest.mark.parametrize("name", LAYOUTS)
def test_no_budget_gets_worse_on_the_calibration_data(name, tmp_path):
    model, plan, ids = made(name, tmp_path)
    before = downs(model)
    seen, _ = watch(model, ids)
    others = {key: v.clone() for key, v in model.state_dict().items() if "down_proj" not in key}
    report = refit(model, plan, ids)
    after = downs(model)
    old_LB = errors(seen, plan, before, before)
    new_LB = errors(seen, plan, before, after)
    assert (new_LB[:, 1:] <= old_LB[:, 1:] * (1 + 1e-6)).all()
    assert (new_LB[:, 1:].sum(0) < 0.98 * old_LB[:, 1:].sum(0)).all()
    assert (new_LB[:, 0] < 0.05 * old_LB[:, 1]).all()
    # the report says the same
    size = {i: 0.0 for i in plan.layers}
    for (i, e), x_nI in seen.items():
        size[i] += float((x_nI @ before[i][e].double()).square().sum())
    size_L1 = torch.tensor(list(size.values())).double()[:, None]
    assert torch.allclose(torch.tensor(report.before).double(), (old_LB / size_L1).mean(0), 1e-4)
    assert torch.allclose(
        torch.tensor(report.after).double(), (new_LB / size_L1).mean(0), rtol=1e-3, atol=1e-6
    )
    assert report.budgets == plan.budgets and set(report.step) == set(plan.layers)
    # nothing but the down projections, and no trace on the modules
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in others.items())
    assert not any(hasattr(layer.module, "flexmoe_observer") for layer in expert_layers(model))


def test_the_members_come_closer_to_the_full_model(tmp_path):
    """End to end, with random weights in a random order; the unpruned one moves a little."""
    model, plan, ids = made("mixtral", tmp_path)
    full = logits(model, ids)

    def distances():
        found = []
        for share in plan.budgets:
            set_budget(model, share)
            found.append(float((logits(model, ids) - full).square().mean()))
        set_budget(model, 0)
        return found

    before = distances()
    refit(model, plan, ids)
    after = distances()
    assert before[0] == 0 and after[0] < 0.05 * before[1]
    assert all(a < b for a, b in zip(after[1:], before[1:], strict=True))


def test_unpruned_alone_changes_nothing(tmp_path):
    model, plan, ids = made("mixtral", tmp_path, budgets=(0.0,))
    before = downs(model)
    report = refit(model, plan, ids)
    assert all(torch.equal(after, before[i]) for i, after in downs(model).items())
    assert report.before == report.after == (0.0,) and report.alone == {}


def test_an_expert_without_tokens_is_left_alone(tmp_path):
    model, plan, ids = made("mixtral", tmp_path)
    layer = expert_layers(model)[0]
    before = downs(model)[0]
    moments = {layer.index: Moments(layer, True)}
    with torch.no_grad(), experts_function(model, "flexmoe_observe"):
        _pass(model, expert_layers(model), moments, ids)
    found = moments[0]
    found.sum_EII[3], found.count_E[3] = 0, 0
    weight_B = torch.tensor([3.0, 1, 1, 1]).double()
    _, step, alone = refit_layer(layer, found, plan.width[0], weight_B, 1.0)
    changed = [not torch.equal(a, b) for a, b in zip(downs(model)[0], before, strict=True)]
    # nothing to fit in 0, which is there in full or not at all, nor in 1, which is never cut
    assert alone == [3] and step > 0
    assert changed == [False, False, True, False, True, True, True, True]


def test_too_few_tokens_are_no_harm_with_damping_and_left_alone_without(tmp_path):
    model, plan, ids = made("mixtral", tmp_path)
    before = downs(model)
    few = ids[:1, :8]  # 16 pairs for 8 experts of 16 channels
    report = refit(model, plan, few, damping=0.0)
    assert any(report.alone.values())
    for i, experts in report.alone.items():
        assert all(torch.equal(downs(model)[i][e], before[i][e]) for e in experts)
    model, plan, _ = made("mixtral", tmp_path)
    seen, _ = watch(model, ids[1:])  # other tokens than those of the fit
    refit(model, plan, few)
    old_LB = errors(seen, plan, before, before)
    assert (errors(seen, plan, before, downs(model)) < old_LB + 0.02 * old_LB[:, 1:2]).all()


@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h"])
def test_memory_groups_give_the_same_weights(name, tmp_path):
    model, plan, ids = made(name, tmp_path)
    one = refit(model, plan, ids, memory=10**9)
    want = downs(model)
    model, plan, ids = made(name, tmp_path)
    two = refit(model, plan, ids, memory=1)
    assert (one.passes, two.passes) == (1, 2)
    assert all(torch.equal(after, want[i]) for i, after in downs(model).items())
    a, b = dataclasses.asdict(one), dataclasses.asdict(two)
    assert {k: a[k] for k in ("step", "alone")} == {k: b[k] for k in ("step", "alone")}
    assert a["after"] == pytest.approx(b["after"])


def test_the_same_twice_and_at_any_budget_the_model_stands_at(tmp_path):
    model, plan, ids = made("olmoe", tmp_path)
    refit(model, plan, ids)
    want = downs(model)
    model, plan, ids = made("olmoe", tmp_path)
    set_budget(model, 0.4)
    cut = logits(model, ids)
    refit(model, plan, ids)
    assert all(torch.equal(after, want[i]) for i, after in downs(model).items())
    assert difference(logits(model, ids), cut) > LOGIT_TOLERANCE  # still at 0.4, with new weights
    set_budget(model, 0)
    assert difference(logits(model, ids), cut) > LOGIT_TOLERANCE


def test_weights_choose_between_the_budgets(tmp_path):
    after = {}
    for name, weights in {"60": (0, 0, 0, 1), "20": (0, 1, 0, 0), "full": (1e6, 1, 1, 1)}.items():
        model, plan, ids = made("mixtral", tmp_path)
        after[name] = refit(model, plan, ids, weights=weights).after
    assert after["60"][3] <= after["full"][3] and after["20"][1] < after["full"][1]
    assert after["full"][0] < 1e-9 < after["20"][0]


def test_what_cannot_work_is_refused(tmp_path):
    model, plan, ids = made("mixtral", tmp_path)
    before = downs(model)
    with pytest.raises(FlexmoeError, match="expected 4 weights"):
        refit(model, plan, ids, weights=(1.0, 1.0))
    with pytest.raises(FlexmoeError, match="none negative"):
        refit(model, plan, ids, weights=(1.0, 1.0, 1.0, -1.0))
    with pytest.raises(FlexmoeError, match="damping"):
        refit(model, plan, ids, damping=-1.0)
    with pytest.raises(FlexmoeError, match="another model"):
        refit(tiny_model("olmoe"), plan, ids)
    assert all(torch.equal(after, before[i]) for i, after in downs(model).items())
    with torch.no_grad():
        expert_layers(model)[0].module.gate_up_proj.fill_(float("inf"))
    with pytest.raises(FlexmoeError, match="not finite"):
        refit(model, plan, ids)
