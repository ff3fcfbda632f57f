"""``flexmoe serve --engine vllm --patterns``: every task is a model id, and ``auto`` finds it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("vllm")

import httpx2
from served import BUDGETS, KEEP, TASKS, make, prompts
from test_server import NAME, Server, answer, body

from flexmoe.errors import FlexmoeError
from flexmoe.premoe import Store
from flexmoe.serve.ids import label
from flexmoe.serve.vllm.config import FlexmoeConfig

LABELS = [label(share) for share in BUDGETS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make(NAME, root)
    return root / NAME


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, list[list[int]]]:
    files = [folder / "tokens.json", folder / "of_tasks.json"]
    return {b: found for file in files for b, found in json.loads(file.read_text()).items()}


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx2.Client]:
    options = ("--patterns", str(folder / "patterns"), "--keep", str(KEEP))
    running = Server(folder / "family", folder / "log", *options)
    with httpx2.Client(base_url=running.up().url, timeout=120) as client:
        yield client
    running.stop()


def test_tasks_are_model_ids_beside_the_budgets(client, tokens) -> None:
    listed = {
        entry["id"]: entry.get("flexmoe") for entry in client.get("/v1/models").json()["data"]
    }
    assert list(listed) == ["moe", *(f"moe:{row}" for row in (*LABELS, *TASKS, "auto"))]
    assert listed["moe:auto"] == {"tasks": list(TASKS)} and listed["moe:code"]["pruned"] == 1 - KEEP
    for row in (*TASKS, "40"):
        for n in range(3):
            assert answer(client, f"moe:{row}", prompts()[n]) == tokens[row][n]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep": None}, "keep is None: expected the share"),
        ({"keep": 1.5}, "1.5"),
        ({"weights": "0" * 64}, "is a store of another model"),
    ],
)
def test_what_is_wrong_with_tasks_is_said_before_workers_start(
    folder, tmp_path, change, message
) -> None:
    """Of `vllm serve` alone, too, which no `flexmoe serve` has checked."""
    shutil.copytree(folder / "patterns", tmp_path / "patterns")
    asked = {"patterns": str(tmp_path / "patterns"), "keep": change.get("keep", KEEP)}
    if weights := change.get("weights"):
        for pattern in Store(tmp_path / "patterns").load_all():
            recipe = pattern.recipe.model_copy(update={"weights_sha256": weights})
            replace(pattern, recipe=recipe).save(tmp_path / "patterns")
    with pytest.raises(FlexmoeError, match=message):
        FlexmoeConfig(asked).maybe_update_config(str(folder / "family"))


def test_the_prefix_cache_never_mixes_tasks(client) -> None:
    long = [3 + 7 * n % 500 for n in range(180)]
    rows = ("0", *TASKS)
    fresh = {row: answer(client, f"moe:{row}", long, cache_salt=f"alone-{row}") for row in rows}
    assert len({json.dumps(found) for found in fresh.values()}) == len(rows)
    for _ in range(2):  # the second time from the cache
        assert {row: answer(client, f"moe:{row}", long) for row in rows} == fresh


def test_the_task_of_each_prompt_is_found_and_told(client, tokens) -> None:
    text = " ".join(f"t{token}" for token in prompts()[1])
    asked = [("code", 0, prompts()[0]), ("tale", 1, text), (None, 2, prompts()[2])]
    for task, n, prompt in asked:
        found = client.post("/v1/completions", json=body("moe:auto", prompt))
        assert found.status_code == 200, found.text
        assert found.headers["x-flexmoe-task"] == (task or "none")
        assert found.headers["x-flexmoe-budget"] == (task or "0")
        assert found.json()["choices"][0]["token_ids"] == tokens[task or "0"][n]
    counted = client.get("/metrics").text
    assert 'flexmoe_retrieved_total{task="code"} 1.0' in counted
    assert 'flexmoe_requests_total{budget="tale",status="ok"}' in counted


@pytest.mark.parametrize(
    ("model", "prompt", "code", "words"),
    [
        ("moe:cod", [5], 404, "Did you mean 'moe:code'"),
        ("moe:auto", [], 400, "the prompt is empty"),
        ("moe:auto", [5, 10**6], 400, "is none of the model's"),
        ("moe:auto", [[5], [6]], 400, "for one prompt"),
    ],
)
def test_what_is_wrong_is_said_and_the_server_stays_up(client, model, prompt, code, words) -> None:
    found = client.post("/v1/completions", json=body(model, prompt))
    assert found.status_code == code and words in found.json()["error"]["message"]
    assert client.get("/health").status_code == 200


def test_memory_is_not_given_back_by_vllm(client) -> None:
    found = client.post("/flexmoe/budget", json={"budget": "40", "release": True})
    assert found.status_code == 501 and "--budgets" in found.json()["error"]["message"]
    assert client.get("/flexmoe/budget").json()["budget"] == "0"
