"""Bootstrap intervals: what they cover, that they repeat, and that pairing pays."""

import math

import numpy as np
import pytest
import torch

from flexmoe.evaluation.intervals import interval, resampled_means, share_interval
from flexmoe.evaluation.losses import loss_rows


def test_95_of_100_intervals_hold_the_true_mean():
    random = np.random.default_rng(0)
    held, rounds, true = 0, 400, 0.5 * (1.0 + 3.0)
    for seed in range(rounds):  # two strata of unlike size that count the same
        strata = [random.normal(1, 1, (20, 1)), random.exponential(3, (60, 1))]
        means = resampled_means(strata, [0.5, 0.5], seed=seed, draws=400)
        low, high = interval(means[:, 0])
        held += low <= true <= high
    assert 0.92 <= held / rounds <= 0.975


def test_small_groups_are_not_taken_for_certain():
    """Drawing n of n items would give (n - 1) / n of the variance: half of it in pairs."""
    values = np.random.default_rng(1).normal(size=(200, 2, 1))
    means = resampled_means(list(values), seed=0)
    unbiased = values.var(1, ddof=1).sum() / 2 / len(values) ** 2
    assert means.var() == pytest.approx(unbiased, rel=0.1)


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly():
    strata = [np.random.default_rng(2).normal(size=(300, 2))]
    first, again, other = (resampled_means(strata, seed=seed) for seed in (7, 7, 8))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert interval(first[:, 0]) == pytest.approx(interval(other[:, 0]), abs=0.02)


def test_chunks_change_nothing(monkeypatch):
    strata = [np.random.default_rng(2).normal(size=(50, 2))]
    whole = resampled_means(strata, draws=100)
    monkeypatch.setattr("flexmoe.evaluation.intervals.CHUNK", 500)
    assert np.allclose(whole, resampled_means(strata, draws=100))


def test_one_item_has_no_interval():
    assert interval(resampled_means([np.ones((1, 1)), np.ones((9, 1))])[:, 0]) is None
    assert interval(np.full(100, np.inf)) is None


def test_shares_are_never_certain():
    assert share_interval(0, 20) == pytest.approx((0, 0.1611), abs=1e-4)
    assert share_interval(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)
    low, high = share_interval(5, 20)
    assert share_interval(15, 20) == pytest.approx((1 - high, 1 - low))
    assert share_interval(20, 20)[1] == 1


def losses(windows=40):
    """Two files whose windows differ much more among each other than the budgets do: losses alone,
    without a divergence or an agreement."""
    found = _losses(windows)
    return {b: {n: _only(loss_N) for n, loss_N in of.items()} for b, of in found.items()}


def _only(loss_N):
    return torch.stack([loss_N, *[torch.full_like(loss_N, math.nan)] * 2], 1)


def _losses(windows):
    generator = torch.Generator().manual_seed(0)
    base = {n: 3 + torch.randn(windows, generator=generator).double() for n in ("a", "b")}
    noise = {n: 0.05 * torch.randn(windows, generator=generator).double() for n in base}
    return {0.0: base, 0.4: {n: base[n] + 0.1 + noise[n] for n in base}}


def test_loss_rows_are_paired_and_files_count_the_same():
    found = losses()
    found[0.4]["b"], found[0.0]["b"] = found[0.4]["b"][:10], found[0.0]["b"][:10]
    rows = loss_rows(found)
    row, whole = rows[0.4], rows[0.0]
    means = {
        b: sum(float(of[:, 0].mean()) for of in files.values()) / 2 for b, files in found.items()
    }
    assert row["nll"] == pytest.approx(means[0.4])
    assert row["increase"] == pytest.approx(means[0.4] - means[0.0])
    assert row["kept"] == pytest.approx(math.exp(-row["increase"]))
    low, high = row["increase_interval"]
    assert low < row["increase"] < high
    assert row["kept_interval"] == pytest.approx((math.exp(-high), math.exp(-low)))
    assert whole["increase"] == 0 and whole["increase_interval"] == (0, 0) and whole["kept"] == 1
    assert str(rows) == str(loss_rows(found))  # nan is not nan
    assert row["by_file"]["b"]["increase"] == pytest.approx(
        float((found[0.4]["b"] - found[0.0]["b"])[:, 0].mean())
    )


def test_paired_intervals_are_far_narrower_than_unpaired_ones():
    found = losses()
    low, high = loss_rows(found)[0.4]["increase_interval"]
    alone = [
        resampled_means([of.numpy()[:, :1] for of in found[b].values()], seed=seed)[:, 0]
        for seed, b in enumerate((0.0, 0.4))
    ]
    unpaired = interval(alone[1] - alone[0])
    assert high - low < 0.2 * (unpaired[1] - unpaired[0])


def test_loss_rows_without_a_base_or_with_one_window():
    found = losses()
    alone = loss_rows({0.4: found[0.4]})[0.4]
    assert set(alone) == {"nll", "nll_interval", "files", "by_file"}
    assert alone["by_file"]["a"]["nll"] == alone["files"]["a"]
    row = loss_rows(losses(windows=1))[0.4]
    assert row["increase"] > 0 and row["increase_interval"] is None and row["kept_interval"] is None
