"""Tasks of lm-evaluation-harness: a task file with its own documents, run for real."""

from pathlib import Path

import pytest
import torch

import flexmoe
from flexmoe.data import TINY, load_tokenizer
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.members import budgets_of
from flexmoe.evaluation.pairs import encode, read_pairs, right_pairs, sequence_scores
from flexmoe.evaluation.tasks import check_kept, load_tasks, run_tasks, task_rows
from flexmoe.family import attach
from helpers import random_plan
from minimal import made_pairs, write_pairs

FOLDER = Path(__file__).parent / "offline_task"
lm_eval = pytest.importorskip("lm_eval")


@pytest.fixture(scope="module")
def model():
    found = flexmoe.load("tiny", dtype=torch.float32, device="cpu")
    attach(found, random_plan(found, TINY / "model", (0.0, 0.6)), ranked=False)
    return found


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def test_an_offline_task_is_scored_as_by_hand(model, here):
    tokenizer = load_tokenizer(TINY / "model", model.config)
    tasks = load_tasks(["agreement.yaml"])
    found = run_tasks(budgets_of(model, (0.0, 0.6)), tasks, tokenizer, limit=12)
    rows = task_rows(found)
    for pruned, of in rows.items():
        flexmoe.set_budget(model, pruned)
        right = [_is_right(model, tokenizer, doc) for doc in list(tasks[0].test_docs())[:12]]
        row = of["agreement"]
        assert row["metric"] == "acc" and row["n"] == 12
        assert row["value"] == pytest.approx(sum(right) / 12)
        assert row["interval"][0] <= row["value"] <= row["interval"][1]
    assert 0 < rows[0.0]["agreement"]["value"] < 1
    poorer = rows[0.6]["agreement"]
    assert poorer["ratio"] == pytest.approx(poorer["value"] / rows[0.0]["agreement"]["value"])
    assert rows[0.0]["agreement"]["ratio"] == 1


def test_a_task_of_the_harness_itself(model, monkeypatch, tmp_path):
    """Of BLiMP, whose set a folder of the same name stands in for: there is no hub here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    name = "anaphor_gender_agreement"
    folder = tmp_path / "nyu-mll" / "blimp"
    folder.mkdir(parents=True)
    file = write_pairs(folder / "train.jsonl", made_pairs(12))
    files = (
        f"configs:\n- config_name: {name}\n  data_files:\n  - split: train\n    path: train.jsonl"
    )
    (folder / "README.md").write_text(f"---\n{files}\n---\n")
    tokenizer = load_tokenizer(TINY / "model", model.config)
    found = run_tasks(budgets_of(model, (0.0, 0.6)), load_tasks([f"blimp_{name}"]), tokenizer)
    pairs = encode(read_pairs(file), tokenizer, model.config)
    right = right_pairs(budgets_of(model, (0.0, 0.6)), pairs)
    for pruned, of in task_rows(found).items():
        row = of[f"blimp_{name}"]
        assert row["n"] == 12 and row["value"] == pytest.approx(right[pruned].mean())


def _is_right(model, tokenizer, doc):
    start = tokenizer(doc["start"])["input_ids"]
    scores = []
    for end in doc["ends"]:
        ids = tokenizer(f"{doc['start']} {end}")["input_ids"]
        assert ids[: len(start)] == start
        # the first token has no score in either: the start is common
        scores.append(float(sequence_scores(model, [ids])[0]))
    return scores.index(max(scores)) == doc["right"]


def results(value, items, *, error="N/A", better=True):
    """What the harness gives for one task with one metric, and a group of another one."""
    samples = [{"filter": "none", "f": item} for item in items]
    of = {"alias": "t", "f,none": value, "f_stderr,none": error}
    return {
        "results": {"t": of, "u": of, "g": {"alias": "g", "f,none": value, "f_stderr,none": 0.1}},
        "higher_is_better": {"t": {"f": better}, "g": {"f": better}},
        "n-samples": {"t": {"effective": len(items)}, "u": {"effective": len(items)}},
        "group_subtasks": {"g": ["u"]},
        "samples": {"t": samples},
    }


def test_means_are_resampled_and_the_rest_has_the_harness_error():
    mean = {0.0: results(0.5, [0, 1, 0, 1] * 10), 0.4: results(0.25, [0, 1, 0, 0] * 10)}
    rows = task_rows(mean)
    assert set(rows[0.4]) == {"t", "g"}  # not what a group with a value is made of
    assert rows[0.4]["t"]["ratio"] == 0.5
    assert rows[0.4]["t"]["interval"] == pytest.approx((0.1419, 0.4019), abs=1e-4)  # of a share
    low, high = rows[0.4]["t"]["ratio_interval"]
    assert 0.2 < low < 0.5 < high < 0.8
    same = {0.0: mean[0.0], 0.4: mean[0.0]}
    assert task_rows(same)[0.4]["t"]["ratio_interval"] is None  # not: certainly the same
    graded = {0.0: results(0.5, [0.2, 0.8, 0.4, 0.6])}
    low, high = task_rows(graded)[0.0]["t"]["interval"]
    assert 0.2 < low < 0.5 < high < 0.8
    assert rows[0.4]["g"]["n"] == 40 and rows[0.4]["g"]["ratio_interval"] is None
    assert rows[0.4]["g"]["interval"] == pytest.approx((0.25 - 0.196, 0.25 + 0.196), abs=1e-4)
    other = {0.0: results(7.5, [0, 1, 0, 1], error=0.5)}  # not the mean of these
    assert task_rows(other)[0.0]["t"]["interval"] == pytest.approx((6.52, 8.48), abs=1e-3)
    assert task_rows({0.0: results(7.5, [0, 1])})[0.0]["t"]["interval"] is None


def test_no_ratio_where_less_is_better_or_the_base_has_nothing():
    for of in (results(9.0, [9, 9], better=False), results(0.0, [0, 0])):
        assert task_rows({0.0: of, 0.4: of})[0.4]["t"]["ratio"] is None
    assert task_rows({0.4: results(0.5, [0, 1])})[0.4]["t"]["ratio"] is None


def test_a_share_is_kept_of_what_is_better_when_higher(here, tmp_path):
    text = (FOLDER / "agreement.yaml").read_text()
    check_kept(load_tasks(["agreement.yaml"]))
    less = text.replace("higher_is_better: true", "higher_is_better: false")
    (tmp_path / "less.yaml").write_text(less)
    with pytest.raises(FlexmoeError, match=r"of task 'agreement' less is better \(acc\)"):
        check_kept(load_tasks([str(tmp_path / "less.yaml")]))


def test_tasks_that_are_none(here, tmp_path):
    with pytest.raises(FlexmoeError, match=r"no task 'nowhere\.yaml'"):
        load_tasks(["nowhere.yaml"])
    text = (FOLDER / "agreement.yaml").read_text()
    (tmp_path / "far.yaml").write_text(text.replace("agreement.jsonl", "nowhere.jsonl"))
    with pytest.raises(FlexmoeError, match=r"far\.yaml' cannot be loaded: .*data_files .* rel"):
        load_tasks([str(tmp_path / "far.yaml")])
    (tmp_path / "code.yaml").write_text(text + "unsafe_code: true\n")
    with pytest.raises(FlexmoeError, match="runs code that the model writes"):
        load_tasks([str(tmp_path / "code.yaml")])
