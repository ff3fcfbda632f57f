"""PreMoe: patterns and their store, specialists on disk and side by side, retrieval."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexmoe.checkpoint import Checkpoint
from flexmoe.cli import app, main
from flexmoe.data import calibration_windows, load_tokenizer
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.family import load_stock
from flexmoe.headers import resolve
from flexmoe.methods import find_method, score_layers
from flexmoe.observe import observe
from flexmoe.premoe import Store, activate, compile_plan, load, profile, specialise
from flexmoe.premoe.nearness import distances
from flexmoe.premoe.pattern import Reach
from flexmoe.premoe.retrieval import nearest
from flexmoe.premoe.signature import (
    front,
    mean_signature,
    measure_reach,
    prompt_lengths,
    router_logits,
    signatures,
)
from flexmoe.trace import trace
from helpers import LOGIT_TOLERANCE, difference, ids_of, logits, masked_logits, same_model
from patterns import made_pattern
from zoo import tiny_model

CPU = torch.device("cpu")
SHORT = {"samples": 8, "seq_len": 32}
# an expert a tensor; all experts in one, with biases that stay; dense layers before the first MoE
FORMS = ("qwen3_moe", "gpt_oss", "nemotron_h")


def saved(name: str, folder: Path, tasks: tuple[str, ...] = ("a", "b")) -> tuple[Path, Path]:
    """A random model's checkpoint, and a store with made-up patterns of it."""
    source, store = folder / "model", folder / "store"
    tiny_model(name).save_pretrained(source)
    store.mkdir()
    for seed, task in enumerate(tasks):
        made_pattern(task, source, seed).save(store)
    return source, store


# --- Signature and reach -----------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMS)
def test_the_first_router_is_read_without_any_experts(name, tmp_path):
    """Also where nothing behind that router could be computed."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    ids, first = ids_of(model), expert_layers(model)[0]
    want, seen = router_logits(model, ids), []
    router = next(m for n, m in model.named_modules() if n.endswith((".gate", ".router")))
    router.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids)
        for parameter in first.parameters.values():
            parameter.fill_(math.nan)
    whole = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(want.flatten(0, 1), whole.reshape(-1, first.E).float())
    assert torch.equal(router_logits(model, ids), want)
    with front(tmp_path, CPU) as network:
        assert torch.equal(router_logits(network, ids), want)
        experts = [p for layer in expert_layers(network) for p in layer.parameters.values()]
        assert all(parameter.is_meta for parameter in experts)
    assert torch.allclose(signatures(model, ids), want.double().mean(1))


def test_one_prompt_in_twenty_may_be_out_of_reach():
    model = tiny_model("qwen3_moe")
    ids = torch.randint(3, 60, (40, 32), generator=torch.Generator().manual_seed(1))
    centre_E = mean_signature(model, ids, 8)
    assert torch.allclose(centre_E, router_logits(model, ids).double().mean((0, 1)))
    held = torch.randint(3, 60, (40, 32), generator=torch.Generator().manual_seed(2))
    (short, long), spreads = measure_reach(model, ids, held, centre_E, 8)
    assert (short.tokens, short.prompts, long.tokens, long.prompts) == (16, 80, 32, 40)
    for reach in (short, long):
        own_nE = signatures(model, ids.reshape(-1, reach.tokens)) - centre_E
        covariance_EE = own_nE.T @ own_nE / len(own_nE)
        want_EE = (covariance_EE + covariance_EE.diagonal().diag()) / 2
        assert torch.allclose(spreads[reach.tokens], want_EE)
        away_nE = signatures(model, held.reshape(-1, reach.tokens)) - centre_E
        distance = torch.einsum("ne,ef,nf->n", away_nE, want_EE.inverse(), away_nE).sqrt()
        inside = int((distance <= reach.distance + 1e-9).sum())
        assert inside == math.ceil(0.95 * (reach.prompts + 1))
    (few,), spreads = measure_reach(model, ids[:3, :12], held[:3, :12], centre_E, 8)
    last = distances(signatures(model, held[:3, :12]), centre_E, spreads[12])
    assert few.distance == float(last.max())
    (_,), same = measure_reach(model, ids[:1, :12], ids[:1, :12], centre_E, 8)
    assert (
        torch.linalg.cholesky(same[12]).isfinite().all()
    )  # one prompt, and a distance all the same
    assert prompt_lengths(100) == [16, 32, 64, 100] and prompt_lengths(16) == [16]


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


def test_a_query_gets_the_nearest_pattern_or_the_full_model(tmp_path):
    source, store = saved("qwen3_moe", tmp_path, ())
    model = load_stock(source, dtype=torch.float32)
    a, b = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(3))
    for task, ids in (("a", a), ("b", b)):
        made = replace(made_pattern(task, source), signature_E=signatures(model, ids[None])[0])
        one = Reach(tokens=16, prompts=1, distance=1e-6)
        replace(made, reach=(one,), spread={16: made.spread[16]}).save(store)
    opened = load(source, keep=0.5, store=store, dtype=torch.float32)
    for task, ids in (("a", a), ("b", b)):
        match = opened.adapt(ids)
        assert (match.task, match.nearest) == (task, task) and match.distance < 1e-6
        assert match.distances.keys() == {"a", "b"}
        assert opened.model.flexmoe_plan is opened.plans[task]
        assert min(layer.module.flexmoe_width_E.count(0) for layer in expert_layers(opened.model))
    match = opened.adapt(torch.cat([a[:10], b[:10]]))
    assert match.task is None and match.distance > match.reach == 1e-6
    assert match.distance == min(match.distances.values()) == match.distances[match.nearest]
    assert not any(0 in layer.module.flexmoe_width_E for layer in expert_layers(opened.model))
    for wrong in (a[None], a[:0]):
        with pytest.raises(FlexmoeError, match="the tokens"):
            opened.retrieve(wrong)


def test_shorter_prompts_may_be_further_away(tmp_path):
    saved("qwen3_moe", tmp_path)
    pattern = Store(tmp_path / "store").load("a")
    assert [pattern.reach_at(n) for n in (3, 16, 32, 64, 500)] == [2, 2, 1.5, 1, 1]


def test_the_nearest_task_is_the_one_whose_own_text_is_least_exceeded(tmp_path):
    """Deviations and reaches are those of the prompt's length, between two of them on a line."""
    saved("qwen3_moe", tmp_path)
    a, b = Store(tmp_path / "store").load_all()
    wide = {16: 9 * a.spread[16], 64: a.spread[64]}
    near = replace(a, spread=wide)
    query = a.signature_E + 3.0 / math.sqrt(8)
    assert near.distance(query, 16) == pytest.approx(1)
    assert near.distance(query, 64) == pytest.approx(3)
    assert near.distance(query, 32) == pytest.approx(3 / math.sqrt(5))
    twin = replace(
        b,
        signature_E=a.signature_E,
        reach=tuple(r.model_copy(update={"distance": 4 * r.distance}) for r in b.reach),
    )
    match = nearest([near, twin], query, 16)  # 1 of 2 against 3 of 8
    assert (match.task, match.distance, match.reach) == ("b", pytest.approx(3), 8)
    match = nearest([near, replace(twin, reach=b.reach)], query, 64)
    assert match.task is None and match.distance == pytest.approx(3) and match.reach == 1


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


def edit(path: Path, **fields: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two tasks of the shipped model, made on the command line."""
    folder = tmp_path_factory.mktemp("premoe") / "store"
    for task in ("books", "math"):
        command = f"profile tiny --task {task} --data {task}.train --store {folder}"
        run = CliRunner().invoke(app, [*command.split(), "--samples", "8", "--seq-len", "32"])
        assert run.exit_code == 0, run.output
        assert f"specialise tiny --tasks {task}" in run.output.replace("\n", " ")
    return folder


def test_profile_list_and_specialise_on_the_command_line(store, tmp_path):
    listed = CliRunner().invoke(app, ["patterns", str(store)]).output
    assert all(word in listed for word in ("books.train", "math.train", "peu", "256", "tiny"))
    out = tmp_path / "both"
    command = f"specialise tiny --tasks books,math --keep 0.75 -o {out} --store {store}"
    run = CliRunner().invoke(app, command.split())
    assert run.exit_code == 0, run.output
    assert "25.00%" in run.output and "were read" in run.output and "held beyond" in run.output
    widths = json.loads((out / "config.json").read_text())["quantization_config"]["widths"]
    assert all(sorted(row) == [0] * 4 + [64] * 12 for row in widths.values())
    row = CliRunner().invoke(app, f"eval {out} --data math.valid --samples 2 --seq-len 64".split())
    assert row.exit_code == 0, row.output


PROFILE = "profile tiny --data math.train --samples 2 --seq-len 32 --store STORE"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("specialise tiny --tasks boks --keep 0.5 -o out --store STORE", "Did you mean 'books'"),
        ("specialise tiny --tasks books,books --keep 0.5 -o out --store STORE", "each named once"),
        ("specialise tiny --tasks , --keep 0.5 -o out --store STORE", "each named once"),
        ("specialise tiny --tasks books --keep 50 -o out --store STORE", "at most 1, found 50"),
        ("specialise tiny --tasks books --keep 0.1 -o out --store STORE", "keep at least 0.25"),
        ("specialise tiny --tasks books --keep 0.5 -o STORE --store STORE", "exists already"),
        ("specialise tiny --tasks books --keep 0.5 -o out", "no patterns in 'patterns'"),
        ("specialise ./none --tasks books --keep 0.5 -o out --store STORE", "no folder './none'"),
        ("patterns nowhere", "no patterns in 'nowhere'"),
        ("patterns file", "'file' is a file"),
        (f"{PROFILE} --task books", "has a pattern of 'books' already"),
        (f"{PROFILE} --task a/b", "cannot be the name of a task"),
        (f"{PROFILE} --task auto", "servers call so what they find"),
        (f"{PROFILE} --task 40", "and their budgets"),
        (f"{PROFILE} --task new --method pue", "Did you mean 'peu'"),
        (f"{PROFILE} --task new --method fisher", "scores channels, not whole experts"),
        (f"{PROFILE} --task new --method aimer", "does not look at text"),
        (f"{PROFILE} --task new --samples 0", "at least 1"),
        (f"{PROFILE} --task new --data missing.txt", "does not exist"),
        (f"{PROFILE} --task new --memory lots", "--memory"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_left(
    command, message, store, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    words = [str(store) if word == "STORE" else word for word in command.split()]
    monkeypatch.setattr(sys, "argv", ["flexmoe", *words])
    before = sorted(store.iterdir())
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert sorted(store.iterdir()) == before
