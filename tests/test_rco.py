"""RCO and DiEP-style: projections and gradients by hand, exact nested budgets, whole runs."""

from dataclasses import replace

import pytest
import torch

import flexmoe
from flexmoe import CompressConfig, FlexmoeError
from flexmoe.data import calibration_windows, load_tokenizer
from flexmoe.experts import expert_layers, experts_function
from flexmoe.headers import resolve
from flexmoe.methods import Text, all_methods
from flexmoe.methods.diep import loss_of
from flexmoe.pipeline import make_plan, rank_channels
from flexmoe.rco import RcoConfig, Units, _slope, learn_mask, learn_order
from flexmoe.training import divergence
from golden_data import golden
from zoo import tiny_model

IDS = torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(0))


def units_of(model, per_channel=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    layers = expert_layers(model)
    shapes = {x.index: (x.E, x.I) if per_channel else (x.E,) for x in layers}
    score = {i: torch.rand(shape, generator=generator) for i, shape in shapes.items()}
    return Units(layers, score), score


def test_the_surface_of_the_budget():
    """Retraction makes the expected share exact; what is projected does not change it."""
    units, score = units_of(tiny_model("qwen3_moe"))
    logit = 3 * torch.randn(len(units.cost_X), generator=torch.Generator().manual_seed(1)).double()
    on = units.retract(logit, 0.3)
    assert float((torch.sigmoid(on) * units.cost_X).sum()) == pytest.approx(0.3, abs=1e-9)
    step = units.project(torch.randn(len(on)).double(), on)
    share = lambda x: float((torch.sigmoid(x) * units.cost_X).sum())  # noqa: E731
    assert abs(share(on + 1e-4 * step) - 0.3) < 1e-7 < abs(share(on + 1e-4) - 0.3)
    prior = units.prior(score)
    for i, part in units.by_layer(prior).items():
        assert float(part.min()) == 0 and float(part.max()) == 1
        assert torch.equal(part.argsort(), score[i].argsort())


def test_the_slope_is_that_of_the_soft_mask():
    """By finite differences: the loss by the mask x the derivative of the soft one."""
    model = tiny_model("qwen3_moe")
    units, _ = units_of(model)
    n, tau, ids = len(units.cost_X), 0.7, IDS[:2]
    noisy = torch.randn(n, generator=torch.Generator().manual_seed(2)).double()
    none = torch.zeros(n, dtype=torch.bool)
    got = _slope(model, ids, units, noisy, none, 0.25, tau)
    teacher = model(input_ids=ids).logits

    def loss(mask):
        for layer, part in zip(units.layers, units.by_layer(mask).values(), strict=True):
            layer.module.flexmoe_mask_EI = part.view(layer.E, 1).expand(-1, layer.I)
        with torch.no_grad(), experts_function(model, "flexmoe_mask"):
            return float(divergence(model(input_ids=ids).logits, teacher)) / ids[:, 1:].numel()

    hard = 1.0 - units.hardest(noisy, 0.25).double()
    soft = torch.sigmoid(-noisy / tau)
    for x in range(n):
        step = torch.zeros(n).double()
        step[x] = 1e-2
        by_mask = (loss(hard + step) - loss(hard - step)) / 2e-2
        want = -by_mask * float(soft[x] * (1 - soft[x])) / tau
        assert float(got[x]) == pytest.approx(want, rel=5e-2, abs=1e-4)


def test_a_step_by_hand(monkeypatch):
    """Noise in antithetic pairs, tau from the first to the last, a step of Adam on the surface."""
    model, seen = tiny_model("qwen3_moe"), []
    units, _ = units_of(model, per_channel=True)
    start_X, slope_X = torch.randn(
        2, len(units.cost_X), generator=torch.Generator().manual_seed(3)
    ).double()
    start_X, none = units.retract(start_X, 0.3), torch.zeros(len(start_X), dtype=torch.bool)

    def slope(model, batch, units, noisy_X, gone_X, pruned, tau):
        seen.append((noisy_X - start_X, tau))
        return slope_X

    monkeypatch.setattr("flexmoe.rco._slope", slope)
    config = RcoConfig(steps=1, draws=2, windows=2)
    got_X = learn_mask(model, IDS, units, start_X, none, 0.3, config)
    step_X = units.project(slope_X, start_X)
    want_X = units.retract(start_X - 0.1 * step_X / (step_X.abs() + 1e-8), 0.3)
    assert torch.allclose(got_X, want_X)
    noise_X = seen[0][0]
    assert torch.allclose(noise_X, -seen[1][0]) and abs(noise_X.mean()) < 0.5 < noise_X.std()
    seen.clear()
    learn_mask(model, IDS, units, start_X, none, 0.3, replace(config, steps=3))
    assert [tau for _, tau in seen[::2]] == pytest.approx([1.0, 0.05**0.5, 0.05])


@pytest.mark.parametrize("per_channel", [False, True])
def test_budgets_are_nested_and_start_at_the_prior(per_channel):
    """Without a step size the prior's order is left as it is."""
    model = tiny_model("qwen3_moe")
    units, score = units_of(model, per_channel)
    still = RcoConfig(steps=1, draws=2, windows=2, lr=0.0)
    order = learn_order(model, IDS, score, (0.25, 0.5), still)
    flat = torch.cat([order[i].flatten() for i in order])
    assert torch.equal(flat.argsort(), units.prior(score).argsort(stable=True))
    moved = learn_order(model, IDS, score, (0.25, 0.5), replace(still, steps=6, lr=1.0))
    again = learn_order(model, IDS, score, (0.25, 0.5), replace(still, steps=6, lr=1.0))
    assert all(torch.equal(moved[i], again[i]) for i in moved)
    assert any(not torch.equal(moved[i], order[i]) for i in moved)
    assert not any(hasattr(layer.module, "flexmoe_mask_EI") for layer in units.layers)


def test_a_step_that_is_not_finite_ends_the_run():
    model = tiny_model("qwen3_moe")
    model.lm_head.weight.data[0] = torch.inf
    with pytest.raises(FlexmoeError, match="not finite"):
        learn_order(model, IDS, units_of(model)[1], (0.5,), RcoConfig(steps=1))


@pytest.mark.parametrize(("method", "unit"), [("rco", "expert"), ("fisher", "channel")])
def test_rco_beats_its_prior_and_hits_every_budget(method, unit):
    """Divergence on the calibration windows at the budget that was learned."""
    learn = RcoConfig(steps=24, draws=2)
    config = CompressConfig(
        method=method, allocate="rco", samples=8, seq_len=32, pruned=(0.25, 0.5), learn=learn
    )
    ranked = rank_channels("tiny", config)
    plan = make_plan(ranked, "rco")  # checks budgets and nesting
    assert plan.recipe.allocate == "rco" and plan.recipe.unit == unit
    assert plan.recipe.settings["learn_steps"] == "24"
    before = make_plan(ranked, "global")
    ids = ranked.windows.ids
    with torch.no_grad():
        teacher = ranked.model(input_ids=ids).logits
        losses = []
        for some in (before, plan):
            for layer in expert_layers(ranked.model):
                i = layer.index
                place = ranked.order[i].long().argsort(1).gather(1, some.order[i].long())
                kept = torch.arange(layer.I) < some.width[i][2][:, None]
                mask = torch.zeros(layer.E, layer.I).scatter(1, place, kept.float())
                layer.module.flexmoe_mask_EI = mask
            with experts_function(ranked.model, "flexmoe_mask"):
                student = ranked.model(input_ids=ids).logits
            losses.append(float(divergence(student, teacher)))
    assert losses[1] < losses[0]


def test_settings_of_rco():
    with pytest.raises(FlexmoeError, match="at least 1 step"):
        RcoConfig(steps=0)
    for draws in (3, 0):
        with pytest.raises(FlexmoeError, match="drawn in pairs"):
            RcoConfig(draws=draws)


def test_dieps_loss_is_the_models_own_at_the_start():
    model, ids, _ = golden("qwen3moe", "reap")
    layers, ids = expert_layers(model), ids[:2]
    ones = {x.index: torch.ones(x.E) for x in layers}
    with torch.no_grad():
        logits = model(ids).logits[:, :-1].flatten(0, 1)
        plain = torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten())
        assert float(loss_of(model, ids, layers, ones)) == pytest.approx(float(plain), abs=1e-4)
        # half of the last layer's output: it has moved by half its norm, the others not at all
        ones[layers[-1].index] *= 0.5
        loss = loss_of(model, ids, layers, ones)
        with experts_function(model, "flexmoe_mask"):
            halved = model(ids).logits[:, :-1].flatten(0, 1)
        cross = torch.nn.functional.cross_entropy(halved, ids[:, 1:].flatten())
        want = float(cross) + 0.01 * 0.5 / 3
        assert float(loss) == pytest.approx(want, rel=1e-5)


def test_dieps_loss_is_that_of_any_parts_of_a_batch():
    """A mean over tokens: how many windows are taken at a time changes nothing but rounding."""
    model, ids, _ = golden("qwen3moe", "reap")
    layers, ids = expert_layers(model), ids[:3]
    generator = torch.Generator().manual_seed(0)
    scale = {x.index: torch.rand(x.E, generator=generator) for x in layers}
    with torch.no_grad():
        parts = [float(loss_of(model, part, layers, scale)) for part in ids.split(1)]
        assert float(loss_of(model, ids, layers, scale)) == pytest.approx(sum(parts) / 3, rel=1e-6)


def test_diep_lowers_its_loss_and_leaves_nothing_behind():
    model = flexmoe.load("tiny", dtype=torch.float32)
    tokenizer = load_tokenizer(resolve("tiny"), model.config)
    ids = calibration_windows("tiny", tokenizer, samples=16, seq_len=32, seed=0).ids
    layers = expert_layers(model)
    found = all_methods()["diep"].score(model, Text(ids))
    again = all_methods()["diep"].score(model, Text(ids))
    assert all(torch.equal(found[i], again[i]) for i in found)
    assert not any(hasattr(x.module, "flexmoe_mask_EI") for x in layers)
    with torch.no_grad():
        start = loss_of(model, ids, layers, {x.index: torch.ones(x.E) for x in layers})
        # within a layer importance is alpha but for a factor
        learned = {i: len(s) * s.softmax(0).float() for i, s in found.items()}
        assert float(loss_of(model, ids, layers, learned)) < float(start)
