"""Losses of windows and distances to a base, against a naive computation."""

import pytest
import torch

import flexmoe
from flexmoe.data import TINY
from flexmoe.evaluation.losses import loss_rows, window_losses
from flexmoe.evaluation.members import Shelf, budgets_of
from flexmoe.family import attach, load_stock
from helpers import random_plan

BUDGETS = (0.0, 0.2, 0.6)
# float32 logits, from batches of other sizes
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


@pytest.fixture(scope="module")
def model():
    found = load_stock("tiny", device="cpu", dtype=torch.float32)
    attach(found, random_plan(found, TINY / "model", BUDGETS), ranked=False)
    return found


@pytest.fixture(scope="module")
def windows():
    generator = torch.Generator().manual_seed(0)
    draw = {"a": 5, "b": 3}
    return {n: torch.randint(3, 4000, (k, 24), generator=generator) for n, k in draw.items()}


def naive(model, pruned, ids):
    """Loss, divergence from budget 0 and agreement with it of one window, token by token."""
    log_p = {}
    for share in (0.0, pruned):
        flexmoe.set_budget(model, share)
        with torch.no_grad():
            log_p[share] = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    rows = []
    for t in range(len(ids) - 1):
        p, q = log_p[0.0][t], log_p[pruned][t]
        kl = float(sum(p.exp() * (p - q)))
        rows.append([-float(q[ids[t + 1]]), kl, float(p.argmax() == q.argmax())])
    return torch.tensor(rows, dtype=torch.float64).mean(0)


def test_windows_are_measured_as_by_a_naive_loop(model, windows):
    found = window_losses(budgets_of(model, BUDGETS), windows, 0.0, batch_size=2)
    for pruned, name, n in ((0.2, "a", 4), (0.6, "b", 1)):
        assert found[pruned][name].shape == (len(windows[name]), 3)
        wanted = naive(model, pruned, windows[name][n])
        torch.testing.assert_close(found[pruned][name][n], wanted, **CLOSE)
    assert (found[0.6]["a"] > found[0.2]["a"])[:, 1].all() and (found[0.2]["a"][:, 1] > 0).all()
    for of in found[0.0].values():  # the base is no distance from itself
        assert (of[:, 1] == 0).all() and (of[:, 2] == 1).all()


def test_batches_and_their_order_change_nothing(model, windows, tmp_path):
    members = budgets_of(model, BUDGETS)
    whole = window_losses(members, windows, 0.0, batch_size=8)
    last = window_losses(dict(reversed(members.items())), windows, 0.0, batch_size=8)
    files = window_losses(members, windows, 0.0, batch_size=8, folder=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    for pruned, name in ((b, n) for b in BUDGETS for n in windows):
        assert torch.equal(whole[pruned][name], files[pruned][name])
        assert torch.equal(whole[pruned][name], last[pruned][name])


def test_chunks_change_nothing(model, windows, monkeypatch):
    members = budgets_of(model, (0.0, 0.6))
    whole = window_losses(members, windows, 0.0)
    monkeypatch.setattr("flexmoe.evaluation.losses.CHUNK", 7 * 4096)
    parts = window_losses(members, windows, 0.0)
    torch.testing.assert_close(parts[0.6]["a"], whole[0.6]["a"], rtol=1e-6, atol=1e-7)


def test_rows_have_distances_with_paired_intervals(model, windows):
    rows = loss_rows(window_losses(budgets_of(model, BUDGETS), windows, 0.0))
    row = rows[0.6]
    assert rows[0.0]["kl"] == 0 and rows[0.0]["agreement_interval"] == (1, 1)
    assert row["kl_interval"][0] < row["kl"] < row["kl_interval"][1]
    assert 0 <= row["agreement"] < 1
    assert row["kl"] == pytest.approx(sum(of["kl"] for of in row["by_file"].values()) / 2)
    assert set(row["by_file"]["a"]) == {*row} - {"files", "by_file"}


def test_without_a_base_there_is_no_distance(model, windows):
    found = window_losses(budgets_of(model, (0.6,)), windows)
    assert found[0.6]["a"][:, 1:].isnan().all() and found[0.6]["a"][:, 0].isfinite().all()
    assert "kl" not in loss_rows(found)[0.6]


def test_a_shelf_holds_one_model_where_two_do_not_fit():
    loaded = []

    def load():
        loaded.append(1)
        return load_stock("tiny", device="cpu")

    shelf = Shelf({"a": load, "b": load}, together=False)
    for name, number in (("a", 1), ("a", 1), ("b", 2), ("a", 3)):
        shelf.open(name)
        assert list(shelf.models) == [name] and len(loaded) == number
    assert shelf.routed == {"a": 1_572_864, "b": 1_572_864}
