"""Plans of whole experts, raw scores on disk, the pages about methods."""

import dataclasses
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import flexmoe
from flexmoe import CompressConfig, FlexmoeError, compress, set_budget
from flexmoe.allocate import allocate_experts
from flexmoe.cli import app
from flexmoe.experts import expert_layers
from flexmoe.exporter import export
from flexmoe.headers import resolve
from flexmoe.plan import LayerRecord, Plan
from flexmoe.prepare import router_groups
from flexmoe.score import score
from flexmoe.uniform import uniform_width
from helpers import LOGIT_TOLERANCE, difference, ids_of, logits
from test_plan import RECIPE, problems
from test_router_rules import expert_plan
from zoo import tiny_model

DOCS = Path(__file__).parent.parent / "docs"


@given(problems(), st.sampled_from(["layer", "global"]))
def test_whole_experts_stay_or_go_and_budgets_are_hit_to_half_a_one(problem, name):
    layers, score, budgets, _ = problem
    score_E = {i: s[:, 0] for i, s in score.items()}
    reach = min(
        s.channels * s.channel_parameters * s.experts / s.parameters for s in layers.values()
    )
    assume(budgets[-1] <= reach)  # a removed expert keeps its down bias
    width = allocate_experts(name, layers, score_E, budgets)
    plan = Plan(  # checks nesting, and each budget to half an expert a layer
        layers={i: LayerRecord(**vars(s), experts_per_token=2) for i, s in layers.items()},
        order={i: torch.arange(s.channels).expand(s.experts, -1) for i, s in layers.items()},
        width=width,
        budgets=tuple(budgets),
        quantum=max(s.channels for s in layers.values()),
        recipe=RECIPE.model_copy(update={"unit": "expert"}),
        bytes_full=4 * sum(s.parameters for s in layers.values()),
        bytes_per_parameter=4,
    )
    for i, shape in layers.items():
        assert set(width[i].unique().tolist()) <= {0, shape.channels}
        for share, width_E in zip(budgets, width[i], strict=True):
            gone = width_E == 0
            if name == "layer" and not shape.fixed_parameters:
                assert abs(int(gone.sum()) - share * shape.experts) <= 0.5 + 1e-9
            if gone.any() and not gone.all():  # the weakest of the layer
                assert score_E[i][gone].max() <= score_E[i][~gone].min()
    middle = (budgets[0] + budgets[1]) / 2
    with pytest.raises(FlexmoeError, match="whole experts and knows those of its budgets only"):
        plan.widths(middle)
    with pytest.raises(FlexmoeError, match="ranked whole experts"):
        uniform_width(plan, budgets[1])


@pytest.mark.parametrize("allocate", ["layer", "global"])
def test_a_budget_without_experts_in_a_layer_is_refused_before_the_pass(allocate):
    model = tiny_model("qwen3_moe")  # 2 layers of 8 experts, 2 a token
    config = CompressConfig(method="reap", router="remove", allocate=allocate, pruned=(0.5, 0.96))
    with pytest.raises(FlexmoeError, match=r"layer . would keep no expert"):
        router_groups(model, config)
    assert router_groups(model, dataclasses.replace(config, pruned=(0.5, 0.875))) == 1


def test_every_layer_keeps_its_best_expert_longest():
    shapes = {layer.index: layer.shape for layer in expert_layers(tiny_model("qwen3_moe"))}
    score = {i: torch.arange(8) + 100.0 * n for n, i in enumerate(shapes)}
    K = dict.fromkeys(shapes, 2)
    for width in allocate_experts("global", shapes, score, (0.875,), 1, K).values():
        assert (width[0] > 0).tolist() == [False] * 7 + [True]


def test_layers_that_keep_different_numbers_do_not_fit_into_one_config(tmp_path):
    model = tiny_model("qwen3_moe")
    model.save_pretrained(tmp_path / "base")
    plan = expert_plan(model, tmp_path / "base", router="remove")
    for i, gone in ((0, 5), (1, 3)):
        plan.width[i][1] = torch.tensor([0] * gone + [plan.layers[i].channels] * (8 - gone))
    plan.save(tmp_path / "plan")
    with pytest.raises(FlexmoeError, match=r"between 3 and 5 experts, config\.json has one number"):
        export(tmp_path / "plan", tmp_path / "out", pruned=0.5, layout="uniform")
    assert not (tmp_path / "out").exists()


def test_a_family_of_whole_experts_by_the_methods_own_rule(tmp_path):
    plan = compress("tiny", tmp_path / "family", CompressConfig(method="aimer", pruned=(0.25, 0.4)))
    assert plan.recipe.allocate == "layer" and plan.recipe.unit == "expert"
    assert [plan.member(b).achieved for b in plan.budgets] == [0, 0.25, 0.375]  # 6.4 of 16: 6
    # in the checkpoint's bfloat16 the two would round at other places
    model = flexmoe.load(tmp_path / "family", dtype="float32")
    stock = flexmoe.load("tiny", dtype="float32")
    set_budget(model, 0.4)
    for layer in expert_layers(stock):
        gone = plan.widths(0.4)[layer.index] == 0
        assert int(gone.sum()) == 6
        with torch.no_grad():
            layer.module.down_proj[gone] = 0
    ids = ids_of(model)
    assert difference(logits(model, ids), logits(stock, ids)) < LOGIT_TOLERANCE


def test_layer_by_layer_is_said_in_the_plan_and_changes_all_layers_but_the_first(tmp_path):
    settings = {"method": "camera", "samples": 2, "seq_len": 32, "pruned": (0.4,)}
    once = compress("tiny", tmp_path / "once", CompressConfig(**settings))
    each = compress("tiny", tmp_path / "each", CompressConfig(**settings, sequential=0.4))
    assert each.recipe.settings["sequential"] == 0.4 and each.recipe.allocate == "layer"
    assert "sequential" not in once.recipe.settings
    same = {i: torch.equal(once.order[i], each.order[i]) for i in once.layers}
    assert same == {0: True, 1: False, 2: False, 3: False}
    assert each.layers == once.layers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "reap", "allocate": "learned"}, r"use layer .*, global or rco"),
        ({"method": "reap", "quantum": 4}, "quantum has no effect"),
        ({"method": "aimer", "samples": 4}, "samples without effect"),
        ({"method": "router-change"}, "give it with --reference"),
        ({"method": "reap", "reference": "tiny"}, "reference has no effect"),
        ({"method": "fisher", "sequential": 0.4}, "sequential has no meaning for method 'fisher'"),
        ({"method": "camera", "sequential": 40}, "between 0 and 1"),
        ({"method": "diep", "memory": 2**34}, "learns on the whole model"),
        ({"method": "diep", "sequential": 0.4}, "no meaning for method 'diep'"),
    ],
)
def test_what_has_no_effect_on_experts_is_refused(settings, message, tmp_path):
    with pytest.raises(FlexmoeError, match=message):
        compress("tiny", tmp_path / "out", CompressConfig(**settings))
    assert not (tmp_path / "out").exists()


def test_raw_scores_of_several_methods_in_one_file(tmp_path):
    out = tmp_path / "scores.safetensors"
    command = f"score tiny --method reap --method camera -o {out} --samples 2 --seq-len 32"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    found = load_file(out)
    assert {key.rpartition(".")[2] for key in found} == {"reap", "camera"} and len(found) == 8
    assert found["layers.0.reap"].shape == (16,) and found["layers.3.camera"].shape == (16, 64)
    with safe_open(out, "pt") as file:
        assert file.metadata()["samples"] == "2" and len(file.metadata()["data_sha256"]) == 64
    with pytest.raises(FlexmoeError, match="exists already"):
        score("tiny", ["reap"], out)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]
    (tmp_path / "empty").mkdir()
    (tmp_path / "full" / "folder").mkdir(parents=True)
    for folder in ("empty", "full"):
        with pytest.raises(FlexmoeError, match="is a folder"):
            score("tiny", ["reap"], tmp_path / folder)


def test_change_of_the_router_is_read_from_a_second_checkpoint(tmp_path):
    """Against a copy whose router rows are half as long, every norm grew by half of itself."""
    source, before = resolve("tiny"), tmp_path / "before"
    before.mkdir()
    (before / "config.json").write_text((source / "config.json").read_text())
    tensors = {}
    for file in source.glob("*.safetensors"):
        tensors |= load_file(file)
    halves = {k: v / 2 if k.endswith("mlp.gate.weight") else v for k, v in tensors.items()}
    save_file(halves, before / "model.safetensors")
    got = score("tiny", ["router-change"], tmp_path / "out.safetensors", reference=before)
    for i, change in got["router-change"].items():
        rows = tensors[f"model.layers.{i}.mlp.gate.weight"].double()
        assert torch.allclose(change, rows.norm(dim=1) / 2, rtol=1e-5)
    with pytest.raises(FlexmoeError, match="give it with --reference"):
        score("tiny", ["router-change"], tmp_path / "other.safetensors")


def test_the_page_of_methods_is_up_to_date():
    page = runpy.run_path(str(DOCS / "methods.py"))["page"]
    assert (DOCS / "methods.md").read_text() == page(), "python docs/methods.py"


def test_the_example_of_a_method_works_as_it_is_printed(tmp_path):
    example, page = (DOCS / "my_method.py").read_text(), (DOCS / "add-a-method.md").read_text()
    assert example[example.index("import flexmoe") :] in page
    method = f"{DOCS / 'my_method.py'}:score"
    config = CompressConfig(method=method, samples=4, seq_len=32, pruned=(0.4,))
    plan = compress("tiny", tmp_path / "family", config)
    assert plan.recipe.allocate == "global"
    model = flexmoe.load(tmp_path / "family", 0.4)
    assert torch.isfinite(logits(model, ids_of(model))).all()
