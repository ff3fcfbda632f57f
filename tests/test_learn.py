"""Learned positions: the step by hand, the worth by finite differences, whole runs."""

import pytest
import torch

from flexmoe.actions import ActionConfig
from flexmoe.data import evaluation_windows
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers, experts_function
from flexmoe.family import set_budget
from flexmoe.learn import LearnConfig, Positions, _worth, edge_step, learn_positions
from flexmoe.pipeline import CompressConfig, attach_plan, compress, make_plan, rank_channels
from flexmoe.plan import Plan
from flexmoe.resume import Work, work_folder
from flexmoe.training import batches, divergence
from zoo import tiny_model


def scores(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        layer.index: torch.rand(layer.E, layer.I, generator=generator)
        for layer in expert_layers(model)
    }


def windows(n=16, t=12):
    return torch.randint(3, 60, (n, t), generator=torch.Generator().manual_seed(0))


def test_batches_use_every_window_before_any_again():
    drawn = torch.cat(list(batches(torch.arange(10), 4, 5, seed=0)))
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))


def test_positions_are_shares_in_the_order_of_the_scores():
    model = tiny_model("mixtral")
    score = scores(model)
    positions = Positions(expert_layers(model), score)
    value_X = torch.cat([s.flatten() for s in score.values()])
    n = len(value_X)
    assert torch.equal(positions.value_X.argsort(), value_X.argsort())
    expected = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    assert torch.allclose(positions.value_X.sort().values, expected)
    assert (positions.spread(value_X) > 0.25).sum() == n * 3 // 4
    back = positions.by_layer(value_X)
    assert all(torch.equal(back[i], score[i]) for i in score)


def test_an_edge_step_by_hand():
    position = torch.tensor([0.1, 0.5, 0.5, 0.9], dtype=torch.float64)
    worth = torch.tensor([100.0, 1.0, 3.0, -50.0], dtype=torch.float64)
    both = torch.stack([worth, worth])
    step = edge_step(position, both, 0.5, 0.01)  # the outer two are far from the edge
    assert torch.allclose(step, torch.tensor([0, -1.0, 1.0, 0], dtype=torch.float64), atol=1e-6)
    scaled = edge_step(position, both * 1e-6 + 5, 0.5, 0.01)  # neither scale nor a shift counts
    assert torch.allclose(step, scaled, atol=1e-6)


def test_a_step_shrinks_to_what_the_halves_agree_on():
    position = torch.full((3,), 0.5, dtype=torch.float64)
    first = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    assert not edge_step(position, torch.stack([first, -first]), 0.5, 0.1).any()
    assert not edge_step(position, torch.stack([first, torch.zeros(3).double()]), 0.5, 0.1).any()
    agreed = edge_step(position, torch.stack([first, first]), 0.5, 0.1)
    other = torch.tensor([0.0, 1.0, -1.0], dtype=torch.float64)  # half of it the other way
    partly = edge_step(position, torch.stack([first, first + 2 * other]), 0.5, 0.1)
    # sum (-2, 2, 0) of power 8; the halves (-1, 0, 1) and (-1, 2, -1) agree on 4 * 0: nothing
    assert not partly.any()
    partly = edge_step(position, torch.stack([first, first + other]), 0.5, 0.1)
    # sum (-2, 1, 1) of power 6; they agree on 4 * 1 of it
    assert torch.allclose(partly, torch.tensor([-2.0, 1, 1]).double() * 4 / 6 / 2**0.5)
    assert agreed.abs().sum() > partly.abs().sum()


def test_the_draws_of_a_run_by_hand(monkeypatch):
    """A budget from each half of the reach, noise in antithetic pairs, ever smaller steps."""
    edges, spread, really = [], [], Positions.spread

    def edge(position_X, worth_2X, pruned, jitter):
        edges.append((pruned, jitter))
        return torch.ones_like(position_X)  # moves all alike, so that positions stay

    monkeypatch.setattr("flexmoe.learn.edge_step", edge)
    monkeypatch.setattr(Positions, "spread", lambda self, x: spread.append(x) or really(self, x))
    model = tiny_model("qwen2_moe")
    learn_positions(model, windows(), scores(model), LearnConfig(steps=2), batch_size=2)
    position_X = really(Positions(expert_layers(model), scores(model)), spread[0])
    for at, left in ((1, 1.0), (4, 0.5)):
        one_X, other_X, moved_X = spread[at : at + 3]
        assert torch.allclose(one_X + other_X, 2 * position_X)
        jitter = 0.03 + 0.07 * left
        assert float((one_X - position_X).std()) == pytest.approx(jitter, rel=0.2)
        assert torch.allclose(moved_X, position_X + 0.1 * left * 2)
        assert [j for _, j in edges[:2]] == pytest.approx([jitter] * 2)
        (low, _), (high, _), *edges = edges
        assert 0.05 <= low < 0.475 <= high < 0.9


def test_worth_is_the_slope_of_the_divergence():
    model = tiny_model("olmoe")
    layers, ids = expert_layers(model), windows(2)
    model.requires_grad_(False)
    kept = {layer.index: torch.ones(layer.E, layer.I) for layer in layers}
    kept[layers[0].index][:, 9:] = 0
    found_X = _worth(model, layers, [kept], ids, len(ids))[0]
    found = Positions(layers, kept).by_layer(found_X)

    @torch.no_grad()
    def loss(mask):
        teacher = model(ids).logits
        for layer in layers:
            layer.module.flexmoe_mask_EI = mask[layer.index]
        with experts_function(model, "flexmoe_mask"):
            return divergence(model(ids).logits.double(), teacher.double()).item()

    for i, e in ((layers[0].index, 1), (layers[1].index, 3)):
        # a whole expert at once, so that the difference stands out of float32's rounding
        up, down = ({n: m.clone() for n, m in kept.items()} for _ in range(2))
        up[i][e] += 2e-2
        down[i][e] -= 2e-2
        slope = (loss(up) - loss(down)) / 4e-2
        assert found[i][e].sum().item() == pytest.approx(-slope, rel=5e-2, abs=1e-4)


def test_a_run_is_repeatable_and_leaves_the_model_alone():
    model = tiny_model("qwen2_moe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    score, config = scores(model), LearnConfig(steps=6)

    def run(**options):
        return learn_positions(model, windows(), score, config, batch_size=4, **options)

    first, again = run(), run()
    assert all(torch.equal(first[i], again[i]) for i in first)
    assert any(not torch.equal(first[i], run(seed=1)[i]) for i in first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(hasattr(layer.module, "flexmoe_mask_EI") for layer in expert_layers(model))
    # sums are in float64 and positions are spread anew in every step: the same to the last bit
    # unless two channels all but tie
    parts = run(micro_batch=1, checkpointing=True)
    for i in first:
        assert torch.allclose(first[i], parts[i], atol=0.02)
        assert (first[i] - parts[i]).abs().mean() < 1e-3


def test_a_step_that_is_not_finite_ends_the_run():
    """Or its channels would stand last in an order that looks like any other."""
    model = tiny_model("qwen2_moe")
    model.lm_head.weight.data[0] = torch.inf
    with pytest.raises(FlexmoeError, match="not finite"):
        learn_positions(model, windows(), scores(model), LearnConfig(steps=1), batch_size=4)


def divergences(ranked, plan, ids):
    """Divergence from the full model at each budget of a plan, nats per token."""
    attach_plan(ranked, plan)
    found = []
    with torch.no_grad():
        teacher = ranked.model(ids).logits
        for pruned in plan.budgets[1:]:
            set_budget(ranked.model, pruned)
            found.append(float(divergence(ranked.model(ids).logits, teacher)) / ids[:, 1:].numel())
    return found


def test_learning_beats_the_global_cut():
    """On text that it has not seen, from ranking scores that leave much to learn."""
    config = CompressConfig(
        samples=32,
        seq_len=64,
        pruned=(0.4, 0.6, 0.8),
        method="magnitude",
        allocate="learned",
        learn=LearnConfig(steps=12),
        batch_size=8,
    )
    ranked = rank_channels("tiny", config)
    ids = torch.cat(
        list(evaluation_windows("tiny", ranked.tokenizer, samples=2, seq_len=128).values())
    )
    one, other = make_plan(ranked, "global"), make_plan(ranked, "learned")
    start, learned = divergences(ranked, one, ids), divergences(ranked, other, ids)
    assert all(a < b for a, b in zip(learned, start, strict=True))
    assert sum(learned) < sum(start) * 0.95
    assert any(not torch.equal(one.order[i], other.order[i]) for i in one.order)  # also the ranking


def test_a_run_that_learns_nothing_ends_where_it_began():
    model = tiny_model("qwen2_moe")
    score = scores(model)
    wild = LearnConfig(steps=1, step_size=50.0)
    found = learn_positions(model, windows(), score, wild, batch_size=2)
    start = Positions(expert_layers(model), score)
    first = start.by_layer(start.value_X)
    ids = windows()

    @torch.no_grad()
    def loss(position):
        total = 0.0
        for pruned in (0.2, 0.4, 0.6, 0.8):
            teacher = model(ids[:8]).logits
            for layer in expert_layers(model):
                layer.module.flexmoe_mask_EI = (position[layer.index] > pruned).float()
            with experts_function(model, "flexmoe_mask"):
                total += float(divergence(model(ids[:8]).logits, teacher))
        return total

    assert loss(found) <= loss(first) * 1.001


def test_a_killed_compression_learns_on_to_the_same_plan(tmp_path, monkeypatch):
    monkeypatch.setattr("flexmoe.resume.EVERY", 0.0)
    config = CompressConfig(samples=8, seq_len=32, pruned=(0.4,), learn=LearnConfig(steps=5))
    compress("tiny", tmp_path / "whole", config)
    seen = []

    def killer(items, description):
        for item in items:
            yield item
            seen.append(description)
            if seen.count("learn") == 3:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress("tiny", tmp_path / "broken", config, track=killer)
    assert work_folder(tmp_path / "broken").is_dir()
    seen.clear()
    compress("tiny", tmp_path / "broken", config, track=killer)
    assert seen.count("learn") == 2  # of 5
    whole, broken = Plan.load(tmp_path / "whole"), Plan.load(tmp_path / "broken")
    assert all(torch.equal(whole.order[i], broken.order[i]) for i in whole.order)
    assert all(torch.equal(whole.width[i], broken.width[i]) for i in whole.width)
    assert not work_folder(tmp_path / "broken").exists()


def test_state_of_another_command_is_refused(tmp_path):
    with Work(tmp_path / "x", {"steps": 1}).on():
        pass
    Work(tmp_path / "x", {"steps": 2})  # nothing was saved yet
    (work_folder(tmp_path / "x") / "done.json").write_text("{}")
    with pytest.raises(FlexmoeError, match="steps 1 there, 2 now"):
        Work(tmp_path / "x", {"steps": 2})


def test_settings_without_effect_are_refused(tmp_path):
    with pytest.raises(FlexmoeError, match="at least 1 step"):
        LearnConfig(steps=0)
    for change in (
        {"allocate": "global", "learn": LearnConfig()},
        {"allocate": "learned", "learn": ActionConfig()},
        {"allocate": "global", "micro_batch": 1},
        {"allocate": "actions", "checkpointing": True},
    ):
        with pytest.raises(FlexmoeError, match="effect"):
            compress("tiny", tmp_path / "out", CompressConfig(**change))


def test_a_batch_without_halves_is_refused_before_the_model_is_loaded(monkeypatch):
    monkeypatch.setattr("flexmoe.pipeline.load_stock", None)
    with pytest.raises(FlexmoeError, match="two halves"):
        rank_channels("tiny", CompressConfig(samples=4, seq_len=16, batch_size=1))


def test_set_budget_after_learning_keeps_the_stock_model():
    config = CompressConfig(samples=8, seq_len=32, pruned=(0.5,), learn=LearnConfig(steps=2))
    ranked = rank_channels("tiny", config)
    ids = ranked.windows.ids[:1]

    @torch.no_grad()
    def logits():
        return ranked.model(ids).logits

    before = logits()
    attach_plan(ranked, make_plan(ranked, "learned"))
    set_budget(ranked.model, 0.5)
    assert not torch.allclose(logits(), before, atol=1e-3)
    set_budget(ranked.model, 0.0)
    assert torch.allclose(logits(), before, atol=1e-4)
