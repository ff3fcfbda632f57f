"""PreMoe: patterns and their store, specialists on disk and side by side, retrieval."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmoe.checkpoint import Checkpoint
from flexmoe.data import calibration_windows, load_tokenizer
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.family import load_stock
from flexmoe.headers import resolve
from flexmoe.methods import find_method, score_layers
from flexmoe.observe import observe
from flexmoe.premoe import Store, activate, compile_plan, load, profile, specialise
from flexmoe.premoe.signature import (
    mean_signature,
)
from flexmoe.trace import trace
from helpers import LOGIT_TOLERANCE, difference, ids_of, logits, masked_logits, same_model
from patterns import FORMS, saved
from zoo import tiny_model

CPU = torch.device("cpu")
SHORT = {"samples": 8, "seq_len": 32}


# --- Profile -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["peu", "tcess"])
def test_a_pattern_has_the_scores_of_its_method_and_survives_the_disk(method, tmp_path):
    made = profile("tiny", "math", "math.train", store=tmp_path, method=method, **SHORT)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["math.json", "math.safetensors"]
    found = Store(tmp_path).load("math")
    assert found.recipe == made.recipe and found.reach == made.reach
    assert torch.equal(found.signature_E, made.signature_E)
    model = load_stock("tiny", dtype=torch.float32)
    tokenizer = load_tokenizer(resolve("tiny"), model.config)
    ids = calibration_windows("math.train", tokenizer, samples=10, seq_len=32, seed=0).ids
    chosen = find_method(method)
    want = score_layers(chosen, expert_layers(model), observe(model, ids[:8], chosen.needs))
    assert found.score.keys() == want.keys() == made.layers.keys()
    for i, score_E in want.items():
        assert torch.allclose(found.score[i], score_E, rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.signature_E, mean_signature(model, ids[:8], 8), atol=1e-5)
    assert found.recipe.samples == 8
    assert [(r.tokens, r.prompts) for r in found.reach] == [(16, 4), (32, 2)]


def test_layer_by_layer_gives_the_same_pattern(tmp_path):
    whole = profile("tiny", "code", "code.train", store=tmp_path, **SHORT)
    parts = profile("tiny", "again", "code.train", store=tmp_path, memory=2**31, **SHORT)
    for i, score_E in whole.score.items():
        assert torch.allclose(parts.score[i], score_E, rtol=1e-4, atol=1e-6)
    assert torch.allclose(parts.signature_E, whole.signature_E, atol=1e-5)
    assert parts.reach[-1].distance == pytest.approx(whole.reach[-1].distance, rel=1e-4)


def test_a_killed_profile_goes_on_after_its_pass(tmp_path, monkeypatch):
    whole = profile("tiny", "code", "code.train", store=tmp_path / "whole", **SHORT)
    store = tmp_path / "store"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("flexmoe.premoe.profiling.front", killed)
        with pytest.raises(KeyboardInterrupt):
            profile("tiny", "code", "code.train", store=store, **SHORT)
    assert Store(store).tasks == [] and (store / "code.work").is_dir()
    with pytest.raises(FlexmoeError, match="keeps the state of another command"):
        profile("tiny", "code", "code.train", store=store, seed=1, **SHORT)
    done = []
    found = profile(
        "tiny", "code", "code.train", store=store, track=lambda i, d: done.append(d) or i, **SHORT
    )
    assert "signature" in done and all(
        torch.equal(found.score[i], s) for i, s in whole.score.items()
    )
    assert sorted(path.name for path in store.iterdir()) == ["code.json", "code.safetensors"]


# --- Plans -------------------------------------------------------------------------------------


def test_specialists_keep_the_best_experts_and_generalists_the_best_on_average(tmp_path):
    _, store = saved("qwen3_moe", tmp_path)
    a, b = Store(store).load_all()
    for patterns in ([a], [a, b]):
        plan = compile_plan(patterns, 0.5)
        for i, layer in a.layers.items():
            mean_E = sum(pattern.score[i] for pattern in patterns) / len(patterns)
            kept = (plan.widths(0.5)[i] == layer.channels).nonzero().flatten()
            assert torch.equal(kept, mean_E.topk(4).indices.sort().values)
    assert plan.recipe.data == "a,b" and plan.recipe.settings["tasks"] == "a,b"
    assert compile_plan([a], 1.0).budgets == (0.0,)


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, math.nan])
def test_a_share_to_keep_lies_between_nothing_and_everything(keep, tmp_path):
    saved("qwen3_moe", tmp_path)
    with pytest.raises(FlexmoeError, match="above 0 and be at most 1"):
        compile_plan(Store(tmp_path / "store").load_all(), keep)


@pytest.mark.parametrize("name", FORMS)
def test_a_token_finds_as_many_experts_as_it_is_sent_to(name, tmp_path):
    saved(name, tmp_path)
    patterns = Store(tmp_path / "store").load_all()
    with pytest.raises(FlexmoeError, match=r"leaves 1 of 8 experts in layer \d") as refused:
        compile_plan(patterns, 0.125)
    least = float(str(refused.value).rpartition(" ")[2])
    plan = compile_plan(patterns, least)
    assert all(int((w > 0).sum()) == 2 for w in plan.widths(plan.budgets[-1]).values())


def test_scores_of_different_methods_are_not_averaged(tmp_path):
    saved("qwen3_moe", tmp_path)
    a, b = Store(tmp_path / "store").load_all()
    other = replace(b, recipe=b.recipe.model_copy(update={"method": "tcess"}))
    with pytest.raises(FlexmoeError, match="'a' was profiled by peu, 'b' by tcess"):
        compile_plan([a, other], 0.5)


# --- A specialist on disk ----------------------------------------------------------------------


def spoil(source: Path, gone: dict[int, list[int]]) -> int:
    """Put NaN in the place of pruned experts in a checkpoint; returns the bytes of the others."""
    model = load_stock(source)
    checkpoint = Checkpoint(source)
    tensors = load_file(source / "model.safetensors")
    left = checkpoint.bytes
    for i, traced in trace(checkpoint, model).items():
        for piece in traced.stored:
            if piece.axis is None:
                continue
            for e in gone[i] if piece.expert is None else {piece.expert} & set(gone[i]):
                part = tensors[piece.name][e] if piece.expert is None else tensors[piece.name]
                left -= part.nbytes
                part.fill_(math.nan)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return left


@pytest.mark.parametrize("name", FORMS)
def test_a_specialist_is_written_without_a_look_at_what_is_pruned(name, tmp_path):
    source, store = saved(name, tmp_path)
    model = load_stock(source, dtype=torch.float32)
    plan = compile_plan([Store(store).load("a")], 0.5)
    share = plan.budgets[-1]
    want = masked_logits(model, plan, share, ids_of(model))
    # expert 0 of a layer is read to tell the weights from those of other models
    gone = {i: [e for e in range(1, 8) if not w[e]] for i, w in plan.widths(share).items()}
    left = spoil(source, gone)
    report = specialise(source, ["a"], tmp_path / "half", keep=0.5, store=store)
    assert report.read == left
    assert report.checked == 8 * len(plan.layers) and report.bytes == plan.member(share).bytes
    found = load_stock(tmp_path / "half", dtype=torch.float32)
    assert difference(logits(found, ids_of(model)), want) < LOGIT_TOLERANCE
    card = (tmp_path / "half" / "README.md").read_text()
    assert "the routed experts that matter least" in card
    assert "flexmoe specialise MODEL --tasks a --keep 0.5" in card
    assert "flexmoe reproduce" not in card


# --- Side by side ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_members_switch_and_come_back_to_the_full_model(name, tmp_path):
    source, store = saved(name, tmp_path)
    stock = load_stock(source, dtype=torch.float32)
    ids = ids_of(stock)
    full = logits(stock, ids)
    opened = load(source, keep=0.5, store=store, dtype=torch.float32)
    assert torch.equal(logits(opened.model, ids), full)
    for task in ("a", "b", "a"):
        member = opened.activate(task)
        plan = opened.plans[task]
        want = masked_logits(load_stock(source, dtype=torch.float32), plan, member.pruned, ids)
        assert difference(logits(opened.model, ids), want) < LOGIT_TOLERANCE
        assert member == plan.member(plan.budgets[-1]) and member.achieved >= 0.49
    both = compile_plan(opened.patterns, 0.75)
    assert activate(opened.model, both).routed_parameters > member.routed_parameters
    assert opened.activate(None).achieved == 0
    assert torch.equal(logits(opened.model, ids), full)
    assert same_model(opened.model, load_stock(source, dtype=torch.float32))
    with pytest.raises(FlexmoeError, match="unknown task 'c'"):
        opened.activate("c")


# --- What is refused ---------------------------------------------------------------------------


def test_weights_of_another_model_are_refused_everywhere(tmp_path):
    _, store = saved("qwen3_moe", tmp_path)
    other = tmp_path / "other"
    tiny_model("qwen3_moe", seed=1).save_pretrained(other)
    another = "is a store of another model: 'a' was profiled on"
    with pytest.raises(FlexmoeError, match=another):
        specialise(other, ["a"], tmp_path / "out", keep=0.5, store=store)
    with pytest.raises(FlexmoeError, match=another):
        load(other, keep=0.5, store=store)
    with pytest.raises(FlexmoeError, match=another):
        profile("tiny", "math", "math.train", store=store, **SHORT)
    assert not (tmp_path / "out").exists() and len(list(store.iterdir())) == 4


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda s: (s / "a.json").write_text("{"), "not valid JSON"),
        (lambda s: edit(s / "a.json", task="b"), "damaged or was edited"),
        (lambda s: edit(s / "a.json", format=1), "has format 1"),
        (lambda s: (s / "a.safetensors").unlink(), "is missing"),
        (lambda s: (s / "a.safetensors").write_bytes(b"0" * 300), "its sha256 does not fit"),
        (lambda s: (s / "b.json").rename(s / "a.json"), "is the pattern of 'b'"),
    ],
)
def test_damaged_patterns_are_refused(harm, message, tmp_path):
    source, store = saved("qwen3_moe", tmp_path)
    harm(store)
    with pytest.raises(FlexmoeError, match=f"{message}.*profile it again"):
        specialise(source, ["a"], tmp_path / "out", keep=0.5, store=store)
    assert not (tmp_path / "out").exists()
