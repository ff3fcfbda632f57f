"""What happens to a request on its way into vLLM, and the command line that starts it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flexmoe.errors import FlexmoeError
from flexmoe.serve.vllm import batch, compat
from flexmoe.serve.vllm.compat import BUDGET, check_run, check_version, row_of_tokens
from flexmoe.serve.vllm.requests import UnknownBudget, pin, set_default

ROWS = {"0": 0, "20": 1, "40": 2}


@pytest.fixture(autouse=True)
def no_default():
    set_default(None)
    yield
    set_default(None)


def run(rows: dict[str, int] | None = ROWS) -> SimpleNamespace:
    config = SimpleNamespace(rows=rows) if rows is not None else None
    return SimpleNamespace(quant_config=config)


def request(extra: dict | None = None, salt: str | None = None) -> SimpleNamespace:
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra), cache_salt=salt)


def test_a_named_budget_is_kept_and_salts_the_prefix_cache() -> None:
    given = {BUDGET: "40", "mine": 1}
    asked = request(given, salt="tenant")
    pin(run(), asked)
    assert asked.sampling_params.extra_args == {BUDGET: "40", "mine": 1}
    assert "40" in asked.cache_salt and "tenant" in asked.cache_salt
    other = request({BUDGET: "20"}, salt="tenant")
    pin(run(), other)
    assert other.cache_salt != asked.cache_salt
    assert given == {BUDGET: "40", "mine": 1}


def test_without_a_budget_the_default_of_the_moment_is_pinned() -> None:
    before, after = request(), request({"mine": 1})
    pin(run(), before)
    set_default("20")
    pin(run(), after)
    assert before.sampling_params.extra_args[BUDGET] == "0"
    assert after.sampling_params.extra_args == {BUDGET: "20", "mine": 1}
    assert before.cache_salt != after.cache_salt


def test_an_unknown_budget_is_a_value_error_that_lists_them() -> None:
    with pytest.raises(UnknownBudget, match=r"'30'.*0, 20, 40"):
        pin(run(), request({BUDGET: "30"}))
    assert issubclass(UnknownBudget, ValueError)  # status 400 in vLLM


def test_models_without_budgets_are_left_alone() -> None:
    for there in (run(None), SimpleNamespace(quant_config=object())):
        asked = request({"mine": 1}, salt="s")
        pin(there, asked)
        assert vars(asked) == vars(request({"mine": 1}, salt="s"))
    pooling = SimpleNamespace(sampling_params=None, cache_salt=None)
    pin(run(), pooling)
    assert pooling.cache_salt is None


def runner(budgets: list[str | None], tokens: list[int]) -> SimpleNamespace:
    params = [SimpleNamespace(extra_args=b and {BUDGET: b}) for b in budgets]
    ids = [f"r{n}" for n in range(len(budgets))]
    owner = np.full(32, 99)  # what an earlier, larger batch has left behind
    owner[: sum(tokens)] = np.repeat(np.arange(len(tokens)), tokens)
    return SimpleNamespace(
        input_batch=SimpleNamespace(req_ids=ids),
        requests={i: SimpleNamespace(sampling_params=p) for i, p in zip(ids, params, strict=True)},
        req_indices=SimpleNamespace(np=owner),
    )


def test_every_token_of_a_batch_is_at_the_budget_of_its_request() -> None:
    found = row_of_tokens(runner(["40", None, "20"], [3, 1, 2]), ROWS, 6)
    assert found.tolist() == [2, 2, 2, 0, 1, 1]
    padded = row_of_tokens(runner(["40", "20"], [2, 1]), ROWS, 8)
    assert padded.tolist()[:3] == [2, 2, 1] and set(padded.tolist()) <= {0, 1, 2}
    assert row_of_tokens(runner([], []), ROWS, 4).tolist() == [0, 0, 0, 0]  # a dummy run


def test_the_batch_is_written_in_place_and_knows_when_it_mixes(monkeypatch) -> None:
    monkeypatch.setattr(batch, "token_budget_T", None)
    monkeypatch.setattr(batch, "single", 0)
    batch.reserve(8, torch.device("cpu"))
    address = batch.token_budget_T.data_ptr()
    batch.fill(np.array([2, 2, 2]))
    assert batch.single == 2
    batch.fill(np.array([1, 2]))
    assert batch.single is None and batch.token_budget_T.tolist() == [1, 2, 2, 0, 0, 0, 0, 0]
    batch.reserve(4, torch.device("cpu"))
    assert batch.token_budget_T.data_ptr() == address


def test_on_a_gpu_no_step_waits_for_the_one_before(monkeypatch) -> None:
    """vLLM prepares a batch while the one before computes: budgets go there from pinned memory,
    which each batch has of its own."""
    copied = []

    class OnGpu:
        is_cuda = True

        def __getitem__(self, some: slice) -> OnGpu:
            return self

        def copy_(self, rows_T: torch.Tensor, non_blocking: bool = False) -> None:
            copied.append((rows_T, non_blocking))

    def pinned(rows_T: torch.Tensor) -> torch.Tensor:
        rows_T = rows_T.clone()
        rows_T.pinned = True
        return rows_T

    monkeypatch.setattr(torch.Tensor, "pin_memory", pinned)
    monkeypatch.setattr(batch, "token_budget_T", OnGpu())
    monkeypatch.setattr(batch, "single", 0)
    rows = np.array([1, 2], dtype=np.int32)
    batch.fill(rows)
    rows[:] = 0
    ((rows_T, at_once),) = copied
    assert at_once and rows_T.pinned and rows_T.tolist() == [1, 2]


def test_beams_are_refused() -> None:
    pytest.importorskip("fastapi")
    from flexmoe.serve.vllm.endpoint import VllmEngine

    engine = VllmEngine("moe")
    with pytest.raises(FlexmoeError, match="use_beam_search is not supported"):
        engine.mark({"use_beam_search": True}, "40")
    assert engine.mark({"use_beam_search": False}, "40")["vllm_xargs"] == {BUDGET: "40"}


def test_settings_and_versions_that_would_lose_budgets_are_refused(monkeypatch) -> None:
    good = SimpleNamespace(
        use_v2_model_runner=False, parallel_config=SimpleNamespace(use_ubatching=False)
    )
    check_run(good)
    with pytest.raises(FlexmoeError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        check_run(SimpleNamespace(**{**vars(good), "use_v2_model_runner": True}))
    for found, words in (
        (None, "not installed"),
        ("0.31.2", "0.31.2 is installed"),
        ("0.33.0", "0.33.0"),
    ):
        monkeypatch.setattr(compat, "engine_version", lambda found=found: found)
        with pytest.raises(FlexmoeError, match=words):
            check_version()
    monkeypatch.setattr(compat, "engine_version", lambda: "0.32.4")
    check_version()
