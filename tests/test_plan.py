"""Plans: exact budgets, nesting, files; whatever the allocator and the shapes."""

import dataclasses
import json
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flexmoe.allocate import PRIMARY, allocate, order_of, widths_from_path
from flexmoe.errors import FlexmoeError
from flexmoe.experts import LayerShape
from flexmoe.plan import LayerRecord, Plan, Recipe, read_manifest
from flexmoe.uniform import uniform_width
from flexmoe.widths import default_quantum

RECIPE = Recipe(
    base_model="tiny",
    model_type="qwen2_moe",
    method="random",
    allocate="global",
    data="",
    data_sha256="",
    samples=0,
    seq_len=0,
    seed=0,
)


@st.composite
def problems(draw):
    """Layers that may differ in every count, scores with ties, budgets, a quantum that may not
    divide the width."""
    quantum = draw(st.sampled_from([1, 2, 3, 8]))
    layers, score = {}, {}
    bias = draw(st.booleans())
    for i in sorted(draw(st.sets(st.integers(0, 9), min_size=1, max_size=3))):
        E, I, H = draw(st.integers(2, 9)), draw(st.integers(quantum, 40)), draw(st.integers(1, 9))
        layers[i] = LayerShape(E, I, H, 3 * H + 2 * bias, H * bias)
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        score[i] = torch.randint(0, 5, (E, I), generator=generator).double()
    of_channels = sum(s.experts * s.channels * s.channel_parameters for s in layers.values())
    reach = 100 * of_channels // sum(s.parameters for s in layers.values())  # the rest is biases
    shares = draw(st.sets(st.integers(1, min(80, reach)), min_size=1, max_size=6))
    return layers, score, [0.0, *sorted(s / 100 for s in shares)], quantum


def plan_of(layers, score, budgets, quantum, width):
    return Plan(
        layers={i: LayerRecord(**vars(s), experts_per_token=2) for i, s in layers.items()},
        order={i: order_of(s) for i, s in score.items()},
        width=width,
        budgets=tuple(budgets),
        quantum=quantum,
        recipe=RECIPE,
        bytes_full=4 * sum(s.parameters for s in layers.values()),
        bytes_per_parameter=4,
    )


@given(problems(), st.sampled_from(sorted(PRIMARY)))
def test_every_allocator_gives_exact_nested_plans(problem, name):
    layers, score, budgets, quantum = problem
    # Plan checks shapes, permutations, nesting, quanta and that each budget is hit
    plan = plan_of(*problem, allocate(name, layers, score, budgets, quantum))
    for share in budgets:
        member = plan.member(share)
        removed = sum(
            int((layers[i].channels - w).sum()) * layers[i].channel_parameters
            for i, w in plan.widths(share).items()
        )
        assert member.routed_parameters == plan.routed_parameters - removed
        assert member.bytes == plan.bytes_full - 4 * removed


@given(problems(), st.integers(0, 99))
def test_a_learned_path_gives_exact_nested_plans(problem, seed):
    """Any path will do, also one that widens again, or stops short of the poorest budget."""
    layers, score, budgets, quantum = problem
    generator = torch.Generator().manual_seed(seed)
    path = [
        (
            share / 10,
            {
                i: torch.randint(0, s.channels + 1, (s.experts,), generator=generator)
                for i, s in layers.items()
            },
        )
        for share in range(1, 5)
    ]
    plan = plan_of(*problem, widths_from_path(layers, score, path, budgets, quantum))
    for share in budgets:
        assert abs(plan.member(share).achieved - share) <= plan.tolerance


@given(problems(), st.floats(0, 0.8), st.floats(0, 0.8))
def test_any_share_between_budgets_is_exact_and_nested(problem, a, b):
    layers, score, budgets, quantum = problem
    plan = plan_of(*problem, allocate("global", layers, score, budgets, quantum))
    rich, poor = sorted(share * budgets[-1] / 0.8 for share in (a, b))
    wide, narrow = plan.widths(rich), plan.widths(poor)
    assert all((wide[i] >= narrow[i]).all() for i in layers)
    for share in (rich, poor):
        assert abs(plan.member(share).achieved - share) <= plan.tolerance
    for k, share in enumerate(budgets):  # and nested with the budgets of the plan themselves
        for i in layers:
            if share <= rich:
                assert (plan.width[i][k] >= wide[i]).all()
            if share >= rich:
                assert (plan.width[i][k] <= wide[i]).all()


def test_a_share_between_budgets_that_blocks_miss_stays_between_them():
    layers = {0: LayerShape(2, 4, 8, 24, 0)}
    width = {0: torch.tensor([[4, 4], [3, 2], [3, 2]]).int()}  # 3 of 8 gone, asked for 2 and 4
    plan = plan_of(layers, {0: torch.zeros(2, 4)}, [0.0, 0.25, 0.5], 1, width)
    assert plan.widths(0.26)[0].tolist() == plan.widths(0.49)[0].tolist() == [3, 2]


@given(problems())
def test_files_give_back_the_same_plan(tmp_path_factory, problem):
    layers, score, budgets, quantum = problem
    plan = plan_of(*problem, allocate("layer", layers, score, budgets, quantum))
    folder = tmp_path_factory.mktemp("plan")
    plan.save(folder, ranked=True)
    again = Plan.load(folder)
    for field in dataclasses.fields(plan):
        mine, theirs = getattr(plan, field.name), getattr(again, field.name)
        if field.name in ("order", "width"):
            assert all(torch.equal(mine[i], theirs[i]) for i in layers)
        else:
            assert mine == theirs, field.name
    assert read_manifest(folder).ranked


def small_plan():
    layers = {0: LayerShape(4, 16, 8, 24, 0), 1: LayerShape(4, 16, 8, 24, 0)}
    score = {i: torch.rand(4, 16, generator=torch.Generator().manual_seed(i)) for i in layers}
    budgets = [0.0, 0.25, 0.5]
    return plan_of(layers, score, budgets, 2, allocate("global", layers, score, budgets, 2))


def test_global_keeps_the_best_and_layer_cuts_every_layer_alike():
    layers = {0: LayerShape(2, 8, 4, 12, 0), 1: LayerShape(2, 8, 4, 12, 0)}
    score = {0: torch.ones(2, 8), 1: torch.full((2, 8), 5.0)}
    score[1][0] = 9.0
    cut = allocate("global", layers, score, [0.5], 1)
    assert cut[0].tolist() == [[0, 0]] and cut[1].tolist() == [[8, 8]]
    cut = allocate("layer", layers, score, [0.5], 1)
    assert int(cut[0].sum()) == 8 and cut[1].tolist() == [[8, 0]]
    cut = allocate("uniform", layers, score, [0.5], 1)
    assert cut[0].tolist() == cut[1].tolist() == [[4, 4]]


def test_channels_without_evidence_keep_their_places():
    score = torch.zeros(2, 5)
    score[1, 3] = 1.0
    assert order_of(score).tolist() == [[0, 1, 2, 3, 4], [3, 0, 1, 2, 4]]


def test_default_quantum():
    assert [default_quantum(i) for i in (8, 16, 64, 256, 512, 768, 14336)] == [
        1, 1, 2, 8, 32, 32, 32,
    ]  # fmt: skip


def broken(field, change):
    plan = small_plan()
    value = {i: t.clone() for i, t in getattr(plan, field).items()}
    change(value)
    return lambda: dataclasses.replace(plan, **{field: value})


def with_budgets(*budgets):
    return lambda: dataclasses.replace(small_plan(), budgets=budgets)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (with_budgets(0.1, 0.25, 0.5), "must rise from 0"),
        (with_budgets(0.0, 0.25, 0.25), "must rise from 0"),
        (with_budgets(), "must rise from 0"),
        (broken("order", lambda o: o.update({0: o[0][:3]})), "do not fit 4 experts"),
        (broken("width", lambda w: w.update({0: w[0][:2]})), "do not fit 4 experts"),
        (broken("width", lambda w: w[1][2].fill_(-2)), "not nested"),
        (broken("width", lambda w: [t[1].fill_(16) for t in w.values()]), "0.25 is missed"),
        (broken("width", lambda w: w[0][2].add_(16 - w[0][2])), "not nested"),
        (broken("width", lambda w: w[0][0].sub_(2)), "budget 0 must keep all"),
        (broken("width", lambda w: w[0][2].sub_(w[0][2])), "is missed"),
        (broken("width", lambda w: w[1][1:].sub_(1)), "multiples of 2"),
        (broken("order", lambda o: o[0][0].zero_()), "not a permutation"),
        (broken("order", lambda o: o.pop(0)), "different layers"),
    ],
)
def test_broken_plans_are_refused(make, message):
    with pytest.raises(FlexmoeError, match=message):
        make()


def whole_experts(*gone, groups=1, **fields):
    """Of 4 experts so many are gone in each of two layers, at a budget of 0.25."""
    recipe = RECIPE.model_copy(update={"unit": "expert", "router_groups": groups})
    width = {i: torch.tensor([[16] * 4, [0] * n + [16] * (4 - n)]) for i, n in enumerate(gone)}
    order = {i: torch.arange(16).int().expand(4, -1) for i in width}
    common = {"budgets": (0.0, 0.25), "quantum": 16, "recipe": recipe}
    return dataclasses.replace(small_plan(), width=width, order=order, **common, **fields)


def test_whole_experts_may_miss_by_half_a_one_a_layer_and_group():
    whole_experts(1, 0)
    with pytest.raises(FlexmoeError, match=r"0\.25 is missed"):
        whole_experts(0, 0)
    whole_experts(0, 0, groups=2)


def test_figures_of_whole_experts_by_the_router_rule(tmp_path):
    plan = whole_experts(1, 1, constant={i: torch.ones(1, 8).expand(4, 8) for i in range(2)})
    routed = 2 * 3 * 16 * 24
    for rule, among, constants in (("keep", 4, 0), ("remove", 3, 0), ("constant", 4, 256)):
        found = plan.figures(0.25, plan.widths(0.25), rule)
        assert found.bytes == 4 * routed + constants
        assert found.active_parameters == routed * 2 / among
    assert plan.figures(0.0, plan.widths(0.0), "constant").bytes == plan.bytes_full
    plan.save(tmp_path)
    again = Plan.load(tmp_path)
    assert all(torch.equal(again.constant[i], plan.constant[i]) for i in plan.layers)


def test_layers_of_several_widths_have_no_uniform_one():
    layers = {0: LayerShape(4, 16, 8, 24, 0), 1: LayerShape(4, 8, 8, 24, 0)}
    score = {i: torch.ones(shape.experts, shape.channels) for i, shape in layers.items()}
    width = allocate("global", layers, score, [0.0, 0.5], 2)
    with pytest.raises(FlexmoeError, match=r"different widths \(\[8, 16\]\)"):
        uniform_width(plan_of(layers, score, [0.0, 0.5], 2, width), 0.5)


@pytest.mark.parametrize("layers", [(0,), (0, 1, 2)])
def test_a_model_with_other_layers_is_refused(layers):
    plan = small_plan()
    shape = plan.layers[0].shape
    plan.check_fits("qwen2_moe", {0: shape, 1: shape})
    with pytest.raises(FlexmoeError, match=r"layer [12] of tiny is .*None"):
        plan.check_fits("qwen2_moe", dict.fromkeys(layers, shape))


@pytest.mark.parametrize(
    ("pruned", "fix"),
    [(0.9, "the nearest is 0.5"), (40, "40 % is 0.4"), (60, "the nearest is 0.5")],
)
def test_a_share_out_of_reach_names_the_nearest(pruned, fix):
    with pytest.raises(FlexmoeError, match=re.escape(fix)):
        small_plan().widths(pruned)


def test_an_impossible_budget_is_refused():
    layers = {0: LayerShape(2, 2, 4, 12, 100)}
    with pytest.raises(FlexmoeError, match="at most"):
        allocate("global", layers, {0: torch.ones(2, 2)}, [0.9], 1)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "flexmoe.json").unlink(), "it has no flexmoe.json"),
        (lambda f: (f / "flexmoe.json").write_text("{"), "not valid JSON"),
        (lambda f: (f / "flexmoe.safetensors").unlink(), "is missing"),
        (lambda f: (f / "flexmoe.safetensors").write_bytes(b"x"), "damaged"),
    ],
)
def test_damaged_files_are_refused(tmp_path, damage, message):
    small_plan().save(tmp_path)
    damage(tmp_path)
    with pytest.raises(FlexmoeError, match=message):
        Plan.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 2}, "has format 2"), ({"quantum": "two"}, "quantum"), ({"extra": 1}, "extra")],
)
def test_manifests_of_another_kind_are_refused(tmp_path, change, message):
    small_plan().save(tmp_path)
    path = tmp_path / "flexmoe.json"
    fields = json.loads(path.read_text()) | change
    del fields["sha256"]  # as one does who edits it by hand
    path.write_text(json.dumps(fields))
    with pytest.raises(FlexmoeError, match=message):
        Plan.load(tmp_path)
