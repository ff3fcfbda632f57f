"""The command line and the environment that ``flexmoe serve`` starts vLLM with, and the check that
vLLM serves what is offered."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from types import SimpleNamespace

import pytest

from flexmoe.errors import FlexmoeError
from flexmoe.exporter import export, write_family
from flexmoe.serve.engine import ServeSettings
from flexmoe.serve.prepare import served_members
from flexmoe.serve.vllm.endpoint import SETTINGS, FlexmoeEndpoint
from flexmoe.serve.vllm.launch import arguments, environment
from helpers import random_plan
from zoo import tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("launch")
    model = tiny_model("mixtral")
    model.save_pretrained(root / "base")
    plan = random_plan(model, root / "base")
    plan.save(root / "plan")
    write_family(root / "base", plan, root / "family")
    export(root / "family", root / "ragged", pruned=0.4, layout="ragged")
    recipe = plan.recipe.model_copy(update={"router": "remove"})
    dataclasses.replace(plan, recipe=recipe).save(root / "removed")
    return root


def settings(folder, what: str, budgets: str | None = None, **more) -> ServeSettings:
    members = served_members(str(folder / what), budgets)
    return ServeSettings(model=str(folder / what), name="moe", members=members, default="0", **more)


def overrides(found: list[str]) -> dict:
    return json.loads(found[found.index("--hf-overrides") + 1])["quantization_config"]


def test_a_family_is_served_at_the_budgets_asked_for(folder) -> None:
    found = arguments(settings(folder, "family", "20,40"), ["--max-model-len", "64"])
    assert found[found.index("--model") + 1] == str(folder / "family")
    assert overrides(found) == {"quant_method": "flexmoe", "shares": [0.2, 0.4]}
    assert found[-2:] == ["--max-model-len", "64"]


def test_a_plan_alone_goes_on_its_base_model(folder) -> None:
    for base in (None, str(folder / "base")):  # by default the one that it names
        found = arguments(settings(folder, "plan", base=base))
        assert found[found.index("--model") + 1] == str(folder / "base")
        assert overrides(found)["plan"] == str(folder / "plan")


def test_tasks_go_along_with_and_without_a_plan(folder) -> None:
    store = {"patterns": "/store", "keep": 0.5}
    expected = {"quant_method": "flexmoe", **store}
    assert overrides(arguments(settings(folder, "base", **store))) == expected
    shares = [0.0, 0.2, 0.4, 0.6]
    assert overrides(arguments(settings(folder, "family", **store))) == {
        **expected,
        "shares": shares,
    }


def test_exports_and_checkpoints_say_all_themselves(folder) -> None:
    for what in ("ragged", "base"):
        found = arguments(settings(folder, what))
        assert found[found.index("--model") + 1] == str(folder / what)
        assert "--hf-overrides" not in found


@pytest.mark.parametrize(
    "option", ["--hf-overrides={}", "--port", "--quantization", "--dtype", "--served_model_name"]
)
def test_options_that_are_ours_are_refused(folder, option) -> None:
    with pytest.raises(FlexmoeError, match="is set by flexmoe serve"):
        arguments(settings(folder, "family"), [option, "x"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--data-parallel-size 2 --enable-expert-parallel", "without their budget"),
        ("--data_parallel_size=2", "without their budget"),
        ("-dp 2", "without their budget"),
        ("--enable-dbo", "splits a batch"),
        ("--api-server-count=2", "there is one server"),
        ("--max-model-len 64 --data-parallel-size", "expected one argument"),
    ],
)
def test_options_that_would_lose_budgets_are_refused(folder, options, words) -> None:
    with pytest.raises(FlexmoeError, match=words):
        arguments(settings(folder, "family"), options.split())


@pytest.mark.parametrize(
    "options",
    ["--tensor-parallel-size 2", "--tensor-parallel-size 2 --enable-expert-parallel", "-dp=1 -ep"],
)
def test_options_that_keep_budgets_go_to_vllm(folder, options) -> None:
    found = arguments(settings(folder, "family"), options.split())
    assert found[-len(options.split()) :] == options.split()


def test_a_device_is_refused(folder) -> None:
    with pytest.raises(FlexmoeError, match="leave --device out"):
        arguments(settings(folder, "family", device="cpu"))


def test_the_environment_names_our_plugins_beside_others(folder) -> None:
    given = settings(folder, "family", api_key="secret")
    found = environment(given, {"VLLM_PLUGINS": "theirs", "HOME": "/"})
    assert found["VLLM_PLUGINS"] == "theirs,flexmoe,flexmoe_api" and found["HOME"] == "/"
    assert found["VLLM_USE_V2_MODEL_RUNNER"] == "0"
    assert ServeSettings.model_validate_json(found[SETTINGS]) == given
    assert "secret" not in " ".join(arguments(given))


def test_a_plan_that_changes_the_router_is_not_served(folder) -> None:
    with pytest.raises(FlexmoeError, match=r"switches widths and no routers.*'remove'"):
        served_members(str(folder / "removed"), None)


@pytest.mark.parametrize(
    ("what", "rows"),
    [
        ("family", {"0": 0, "20": 1, "40": 2, "60": 3}),
        ("ragged", {"40": 0}),
        ("base", None),
    ],
)
def test_the_server_starts_where_vllm_serves_what_is_offered(folder, what, rows) -> None:
    check(settings(folder, what), rows)


@pytest.mark.parametrize(("what", "rows"), [("family", None), ("family", {"0": 0, "20": 1})])
def test_and_nowhere_else(folder, what, rows) -> None:
    with pytest.raises(FlexmoeError, match="0, 20, 40, 60 are offered, and vLLM serves"):
        check(settings(folder, what), rows)


def check(given: ServeSettings, rows: dict[str, int] | None) -> None:
    endpoint = FlexmoeEndpoint()
    endpoint.settings = given
    config = SimpleNamespace(rows=rows) if rows is not None else None
    engine = SimpleNamespace(vllm_config=SimpleNamespace(quant_config=config))
    asyncio.run(endpoint.init_state(engine, None, None))
