"""The gate: what passes, what fails, and what it says."""

import pytest

from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.quality import check_gate, gate, kept


def row(pruned, share, spread=None, **others):
    return {"pruned": pruned, "kept": share, "kept_interval": spread, "pairs": None, **others}


ROWS = [
    row(0.0, 1.0, (1.0, 1.0)),
    row(0.2, 0.99, (0.98, 1.0)),
    row(0.4, 0.96, (0.93, 0.98)),
    row(0.6, 0.8, (0.7, 0.9)),
]


def test_all_pass_and_who_might_not():
    verdict = gate(ROWS[:2], 0.95)
    assert verdict.passed and verdict.text == (
        "all measured budgets keep at least 0.95 of the likelihood per token"
    )
    verdict = gate(ROWS[:3], 0.95)
    assert verdict.passed
    assert "not certain: 40 % pruned keeps 0.9600 (0.9300 to 0.9800)" in verdict.text


def test_who_fails_and_the_smallest_that_passes():
    verdict = gate(ROWS, 0.97)
    assert not verdict.passed
    lines = verdict.text.splitlines()
    assert lines[1:3] == [
        "  40 % pruned keeps 0.9600 (0.9300 to 0.9800)",
        "  60 % pruned keeps 0.8000 (0.7000 to 0.9000)",
    ]
    assert lines[3] == "the smallest that passes is the one at 20 % pruned"
    assert "no measured budget passes" in gate(ROWS[3:], 0.9).text
    assert gate(ROWS, 0.8).passed  # at least
    assert not gate([row(0.4, float("nan"))], 0.1).passed


def test_by_tasks_the_worst_one_counts():
    tasks = {n: {"ratio": r, "ratio_interval": None} for n, r in (("a", 1.02), ("b", 0.9))}
    found = row(0.4, 0.99, tasks=tasks)
    assert kept(found, "tasks") == (0.9, None)
    assert not gate([found], 0.95, "tasks").passed and gate([found], 0.95).passed
    pairs = {"ratio": 0.97, "ratio_interval": (0.95, 0.99)}
    assert kept(found | {"pairs": pairs}, "pairs") == (0.97, (0.95, 0.99))


def test_what_was_not_measured_cannot_pass():
    assert kept(row(0.4, None), "loss") is None
    assert kept(row(0.4, 0.9), "tasks") is None and kept(row(0.4, 0.9), "pairs") is None
    verdict = gate(
        [row(0.2, 0.9, pairs={"ratio": 1.0, "ratio_interval": None}), row(0.4, 0.9)], 0.95, "pairs"
    )
    assert not verdict.passed
    assert "accuracy on minimal pairs kept at pruned 0.4 cannot be told" in verdict.text


def test_gates_that_are_none():
    for share, by, message in (
        (95, "loss", "95 % is 0.95"),
        (0, "loss", "above 0"),
        (float("nan"), "loss", "above 0"),
        (0.9, "task", "Did you mean 'tasks'"),
    ):
        with pytest.raises(FlexmoeError, match=message):
            check_gate(share, by)
