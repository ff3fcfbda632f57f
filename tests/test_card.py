"""Model cards: metadata that the Hub reads, the record in them, the measured table."""

from dataclasses import replace

import pytest
from huggingface_hub import ModelCard

from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.curve import of_weights, save_curve, versions
from flexmoe.evaluation.records import Curve, OfWeights
from flexmoe.exporter import export, write_family
from flexmoe.headers import EXPORT_NAME, read_json
from flexmoe.learn import LearnConfig
from flexmoe.pipeline import CompressConfig
from flexmoe.plan import Plan, Recipe
from flexmoe.recover_config import RecoverConfig
from flexmoe.reports.card import refresh_card, write_card
from flexmoe.reports.provenance import Record, commands, given, record_in, record_of
from helpers import made_curve, random_plan
from zoo import tiny_model

BASE_CARD = """\
---
license: other
license_name: someones
license_link: https://example.org/licence
language: [en, de]
tags: [theirs]
base_model: before/that
---
# Their model
"""
HUB = "someone/Model-8x16"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("card") / "source"
    tiny_model("mixtral").save_pretrained(folder)
    (folder / "README.md").write_text(BASE_CARD)
    return folder


@pytest.fixture
def plan(source):
    made = random_plan(tiny_model("mixtral"), source, (0.0, 0.2, 0.4))
    options = {"samples": 8, "pruned": [0.2, 0.4]}
    thin = {0: [1, 2]}
    recipe = made.recipe.model_copy(
        update={
            "base_model": HUB,
            "options": options,
            "thin_experts": thin,
            "versions": versions(),
            "hardware": "an abacus",
        }
    )
    return replace(made, recipe=recipe)


@pytest.fixture
def family(source, plan, tmp_path):
    return write_family(source, plan, tmp_path / "family")


def test_metadata_parses_back_and_the_licence_is_inherited(family, tmp_path):
    card = ModelCard.load(family / "README.md")
    data = card.data.to_dict()
    assert data == {
        "license": "other",
        "license_name": "someones",
        "license_link": "https://example.org/licence",
        "language": ["en", "de"],
        "pipeline_tag": "text-generation",
        "library_name": "transformers",
        "tags": ["moe", "flexmoe", "pruned"],
        "base_model": HUB,
    }
    assert "Their model" not in card.content
    assert f"[{HUB}](https://huggingface.co/{HUB})" in card.content
    for said in (
        "--samples 8 --pruned 0.2,0.4",
        "an abacus",
        "fewer than 100 tokens of it: 2.",
        "`someones`",
    ):
        assert said in card.content
    for layout in ("ragged", "masked", "uniform"):
        out = tmp_path / layout
        export(family, out, pruned=0.4, layout=layout)
        made = ModelCard.load(out / "README.md")
        assert made.data.to_dict() == data
        assert f"--pruned 0.4 --layout {layout}" in made.content
        assert ("import flexmoe" in made.content) == (layout == "ragged")


def test_recovered_weights_are_a_finetune_and_local_bases_have_no_id(source, plan, tmp_path):
    done = {"mode": "full", "data_sha256": "1" * 64, "options": {"tokens": 9}}
    for update, relation in (
        ({"recovery": [done]}, "finetune"),
        ({"base_model": "/some/`folder`|x"}, None),
        ({"base_model": "tiny"}, None),
    ):
        changed = replace(plan, recipe=plan.recipe.model_copy(update=update))
        out = write_family(source, changed, tmp_path / str(len(list(tmp_path.iterdir()))))
        card = ModelCard.load(out / "README.md")
        assert card.data.to_dict().get("base_model_relation") == relation
        assert ("base_model" in card.data.to_dict()) == ("base_model" not in update)
        assert record_in(out / "README.md").recipe.base_model == changed.recipe.base_model


@pytest.mark.parametrize(
    "readme",
    [None, "# no metadata", "---\nlicense: [unclosed\n---\n", "---\n- a\n---\n", b"\xff\xfe"],
)
def test_a_licence_that_cannot_be_read_is_stated_unknown(family, readme, tmp_path):
    path = family / "README.md"
    path.unlink()
    if readme is not None:
        path.write_bytes(readme.encode() if isinstance(readme, str) else readme)
    write_card(family)
    assert ModelCard.load(path).data.license == "unknown"
    assert "Licence: unknown" in path.read_text()
    write_card(family)  # unknown is nothing to inherit
    assert "Licence: unknown" in path.read_text()


def test_the_card_alone_holds_the_record(family, tmp_path):
    found, wanted = record_in(family / "README.md"), record_of(family)
    assert wanted.weights_sha256 == of_weights(family).weights_sha256
    recipe = wanted.recipe.model_copy(update={"thin_experts": {}})
    assert found == wanted.model_copy(update={"recipe": recipe})
    assert commands(found) == [
        f"flexmoe compress {HUB} -o FAMILY --samples 8 --pruned 0.2,0.4",
    ]
    text = (family / "README.md").read_text()
    card = tmp_path / "card.md"
    for change, message in (
        (("```json flexmoe", "```json"), "no card of flexmoe"),
        (('"kind": "family"', '"kind": "tree"'), "kind"),
        (('"format": 1', '"format": 9'), "format 9"),
        (('"recipe": {', '"recipe": ['), "not valid JSON"),
    ):
        card.write_text(text.replace(*change))
        with pytest.raises(FlexmoeError, match=message):
            record_in(card)
    card.write_bytes(text.replace("\n", "\r\n").encode())
    assert record_in(card) == found


def test_eval_refreshes_its_table_and_nothing_else(family):
    path = family / "README.md"
    before = path.read_bytes()
    assert b"Nothing yet" in before
    path.write_bytes(before + b"mine: \xe4\n")  # not UTF-8
    curve = made_curve(Plan.load(family), of_weights(family))
    refresh_card(family, curve)
    after = path.read_bytes()
    assert after.endswith(b"mine: \xe4\n")
    begin, end = b"<!-- flexmoe: measured -->", b"<!-- flexmoe: end -->"
    assert after[: after.index(begin)] == before[: before.index(begin)]
    assert after[after.index(end) : -8] == before[before.index(end) :]
    table = after[after.index(begin) : after.index(end)].decode()
    for point in curve.budgets:
        for value in (point.nll, point.increase, point.kept, *point.files.values()):
            assert f"{value:.4g}" in table
    path.write_text("my own card")
    refresh_card(family, curve)
    assert path.read_text() == "my own card"


def test_an_export_tells_what_its_member_was_measured_at(family, tmp_path):
    curve = made_curve(Plan.load(family), of_weights(family))
    save_curve(family, curve)
    export(family, tmp_path / "ragged", pruned=0.4, layout="ragged")
    text = (tmp_path / "ragged" / "README.md").read_text()
    assert f"{curve.budgets[2].nll:.4g}" in text and f"{curve.budgets[1].nll:.4g}" not in text
    export(family, tmp_path / "between", pruned=0.3, layout="ragged")  # was not measured
    export(family, tmp_path / "uniform", pruned=0.4, layout="uniform")  # has other widths
    save_curve(
        family, curve.model_copy(update={"of": OfWeights(plan_sha256="0", weights_sha256="0")})
    )
    export(family, tmp_path / "stale", pruned=0.4, layout="ragged")
    for name in ("between", "uniform", "stale"):
        assert "Nothing yet" in (tmp_path / name / "README.md").read_text()


def test_a_uniform_export_says_what_it_came_to(family, tmp_path):
    export(family, tmp_path / "uniform", pruned=0.4, layout="uniform")
    achieved = read_json(tmp_path / "uniform" / EXPORT_NAME)["achieved"]
    text = (tmp_path / "uniform" / "README.md").read_text()
    said = text.split("## How it was made")[0]
    assert said.count(f"{100 * achieved:.4g}%") == 4 and "40%" not in said
    assert record_in(tmp_path / "uniform" / "README.md").pruned == 0.4


def test_a_card_says_what_is_compared_and_each_loss_once(family):
    curve = made_curve(Plan.load(family), of_weights(family), ("a", "b"))
    by_file = {name: {"nll": 2.5, "nll_interval": None, "increase": 0.5} for name in "ab"}
    against = {"model": "b_g", "nll": 2.0, "files": {"a": 2.0, "b": 2.0}, "pairs": None}
    against |= {"routed_parameters": 1, "bytes": 2}
    points = [point | {"by_file": by_file} for point in curve.model_dump()["budgets"]]
    saved = {**curve.model_dump(), "against": against, "budgets": points}
    refresh_card(family, Curve.model_validate(saved))
    text = (family / "README.md").read_text()
    assert "| `by file: a: loss` |" in text and "loss: a`" not in text.replace("file: a: loss", "")
    assert "compared with `b_g`." in text
    refresh_card(family, curve)
    text = (family / "README.md").read_text()
    assert "| `loss: a` |" in text and "compared with the full model." in text


def test_commands_are_what_was_asked_for():
    assert given(CompressConfig()) == {}
    assert given(CompressConfig(learn=LearnConfig())) == {}
    config = CompressConfig(data="a b.txt:2", learn=LearnConfig(steps=5), checkpointing=True)
    asked = given(config)
    assert asked == {"data": "a b.txt:2", "learn": {"steps": 5}, "checkpointing": True}
    recipe = Recipe(
        base_model="my model", model_type="x", method="fisher", allocate="learned", data="",
        data_sha256="", samples=0, seq_len=0, seed=0, options=asked | {"processes": 2},
        recovery=[{"options": given(RecoverConfig(mode="lora", lr=1e-3, at=0.4))}],
    )  # fmt: skip
    record = Record(kind="ragged", pruned=0.4, recipe=recipe, plan_sha256="", weights_sha256="")
    assert commands(record) == [
        "torchrun --nproc-per-node 2 -m flexmoe compress 'my model' -o FAMILY --data 'a b.txt:2' "
        "--checkpointing --learn-steps 5",
        "flexmoe recover FAMILY -o FAMILY-2 --mode lora --at 0.4 --lr 0.001",
        "flexmoe export FAMILY-2 -o MODEL --pruned 0.4 --layout ragged",
    ]
    old = recipe.model_copy(update={"options": None})
    assert commands(record.model_copy(update={"recipe": old})) == []
