"""compress to a family, open it, switch budgets: on the shipped model's kind and four others."""

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import flexmoe
from flexmoe.data import TINY
from flexmoe.errors import FlexmoeError
from flexmoe.learn import LearnConfig
from flexmoe.pipeline import CompressConfig
from helpers import difference, ids_of, logits, masked_logits, same_model
from zoo import tiny_model

NAMES = ["qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "gpt_oss"]
SHARES = (0.2, 0.4, 0.6)
TOLERANCE = 1e-5  # float32 summation order


def checkpoint(folder: Path, name: str) -> Path:
    """A random model of the vocabulary of the shipped tokenizer, with that tokenizer."""
    tiny_model(name, vocab_size=4096).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "model" / file, folder)
    return folder


def config(**changes) -> CompressConfig:
    settings = {"samples": 8, "seq_len": 16, "pruned": SHARES, "quantum": 2, "allocate": "global"}
    return CompressConfig(**settings | changes)


def fp32(path, **settings):
    return flexmoe.load(path, dtype=torch.float32, device="cpu", **settings)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Base checkpoint, family and plan of each kind, made once."""
    cache = {}

    def make(name):
        if name not in cache:
            root = tmp_path_factory.mktemp(name)
            base = checkpoint(root / "base", name)
            plan = flexmoe.compress(base, root / "family", config(device="cpu"))
            cache[name] = base, root / "family", plan
        return cache[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_family_loads_in_stock_transformers_and_equals_the_original(made, name):
    base, family, _ = made(name)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ranked = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32)
    ids = ids_of(original)
    assert difference(logits(ranked, ids), logits(original, ids)) < TOLERANCE
    assert (family / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_switching_equals_masking_and_comes_back_bit_for_bit(made, name):
    base, family, plan = made(name)
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = fp32(family)
    ids = ids_of(model)
    weights = {key: (value.data_ptr(), value.clone()) for key, value in model.state_dict().items()}
    full = logits(model, ids)
    stock = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32)
    assert same_model(model, stock)
    assert difference(full, logits(stock, ids)) < TOLERANCE
    for share in (*SHARES, 0.5, 0.1):  # also between budgets of the plan
        member = flexmoe.set_budget(model, share)
        assert abs(member.achieved - share) <= plan.tolerance
        cut = logits(model, ids)
        assert difference(cut, masked_logits(original, plan, share, ids)) < TOLERANCE
        assert difference(cut, full) > 1e-3
        flexmoe.set_budget(model, 0)
        assert torch.equal(logits(model, ids), full)
    for key, value in model.state_dict().items():
        assert value.data_ptr() == weights[key][0] and torch.equal(value, weights[key][1])


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_alone_is_the_family(made, name, tmp_path):
    base, family, plan = made(name)
    plan.save(tmp_path)
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 20_000
    ids = ids_of(fp32(family))
    for share in (0.0, 0.4):
        alone, whole = fp32(tmp_path, pruned=share, base=base), fp32(family, pruned=share)
        assert same_model(alone, whole)
        assert difference(logits(alone, ids), logits(whole, ids)) < TOLERANCE
    done = flexmoe.export(tmp_path, tmp_path / "out", pruned=0.4, layout="ragged", base=base)
    assert difference(logits(fp32(done.path), ids), logits(whole, ids)) < TOLERANCE
    assert (tmp_path / "out" / "config.json").is_file()
    # the recipe names its base, so it is found again
    assert same_model(fp32(tmp_path, pruned=0.4), alone)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["ragged", "masked"])
def test_exports_equal_the_switched_family(made, name, layout, tmp_path):
    _, family, plan = made(name)
    model = fp32(family, pruned=0.4)
    ids = ids_of(model)
    done = flexmoe.export(family, tmp_path / "out", pruned=0.4, layout=layout)
    again = flexmoe.load(done.path, dtype=torch.float32)
    assert difference(logits(again, ids), logits(model, ids)) < TOLERANCE
    member = plan.member(0.4)
    assert done.routed_parameters == member.routed_parameters
    if layout == "ragged":
        assert done.bytes == member.bytes < plan.member(0).bytes


def test_learned_widths_end_to_end(tmp_path):
    base = checkpoint(tmp_path / "base", "olmoe")
    learn = LearnConfig(steps=12)
    settings = config(method="taylor", allocate="learned", learn=learn, batch_size=4)
    plan = flexmoe.compress(base, tmp_path / "family", settings)
    assert plan.recipe.settings["learn_steps"] == "12"
    assert plan.recipe.method == "taylor" and plan.recipe.allocate == "learned"
    again = flexmoe.compress(base, tmp_path / "again", settings)
    for i in plan.layers:
        assert torch.equal(plan.order[i], again.order[i])
        assert torch.equal(plan.width[i], again.width[i])


def test_methods_without_data_need_no_tokenizer(tmp_path):
    tiny_model("mixtral").save_pretrained(tmp_path / "base")
    settings = config(method="magnitude", samples=None, seq_len=None)
    plan = flexmoe.compress(tmp_path / "base", tmp_path / "family", settings)
    assert plan.recipe.data == "" and plan.layers[0].experts_per_token == 2


def test_a_batch_size_of_your_own_changes_no_score_of_tokens(made, tmp_path):
    base, _, plan = made("mixtral")
    other = flexmoe.compress(base, tmp_path / "family", config(batch_size=3))
    assert other.recipe.settings == {"batch_size": 3}
    assert all(torch.equal(plan.order[i], other.order[i]) for i in plan.layers)


def test_generation_at_a_budget_with_and_without_cache(made):
    _, family, _ = made("qwen2_moe")
    model = fp32(family, pruned=0.4)
    ids = ids_of(model)
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    cached = model.generate(ids, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **settings))
    flexmoe.set_budget(model, 0)
    assert not torch.equal(cached, model.generate(ids, use_cache=True, **settings))


def test_a_plan_knows_its_very_weights(made, tmp_path):
    _, family, plan = made("olmoe")
    assert len(plan.recipe.weights_sha256) == 64 + 1 + 64
    plan.save(tmp_path / "plan")
    other = checkpoint(tmp_path / "other", "olmoe")
    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.experts.down_proj.add_(1e-3)
    model.save_pretrained(other)
    for wrong in (other, family):  # another fine-tune; channels that are in order already
        with pytest.raises(FlexmoeError, match="not those that the plan was made for"):
            flexmoe.load(tmp_path / "plan", base=wrong)
        with pytest.raises(FlexmoeError, match="not those that the plan was made for"):
            export = tmp_path / "export"
            flexmoe.export(tmp_path / "plan", export, pruned=0.4, layout="masked", base=wrong)


def test_what_was_computed_is_kept_when_the_family_cannot_be_written(made, tmp_path, monkeypatch):
    base, family, _ = made("mixtral")

    def full_disk(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("flexmoe.exporter.rank_checkpoint", full_disk)
    with pytest.raises(FlexmoeError, match=r"No space left on device. What was computed is kept"):
        flexmoe.compress(base, tmp_path / "out", config(device="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["out.work"]
    kept = fp32(tmp_path / "out.work" / "plan", pruned=0.4)
    ids = ids_of(kept)
    whole = fp32(family, pruned=0.4)
    assert same_model(kept, whole)
    assert difference(logits(kept, ids), logits(whole, ids)) < TOLERANCE
    monkeypatch.undo()
    monkeypatch.setattr("flexmoe.pipeline.load_stock", None)  # nothing is computed again
    flexmoe.compress(base, tmp_path / "out", config(device="cpu"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for file in family.iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes()


def test_the_whole_demo_in_small(tmp_path):
    from rich.console import Console

    from flexmoe.demo import CONFIG, demo
    from flexmoe.progress import silent

    small = dataclasses.replace(CONFIG, samples=16, learn=LearnConfig(steps=3))
    with open(tmp_path / "screen", "w") as screen:
        demo(tmp_path / "demo", Console(file=screen, width=120), silent, small, samples=1)
    said = (tmp_path / "screen").read_text()
    for words in ("uniform export", "ragged export", "60% pruned:", "perplexity", "80%"):
        assert words in said
    for name in ("quality.png", "widths-40.png"):
        assert (tmp_path / "demo" / name).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "mine").mkdir()
    with pytest.raises(FlexmoeError, match="not from an earlier demo"):
        demo(tmp_path / "mine", Console(), silent, small)


def test_same_seed_same_files(made, tmp_path):
    base, family, _ = made("mixtral")
    flexmoe.compress(base, tmp_path / "again", config(device="cpu"))
    for file in sorted(family.iterdir()):
        mine = hashlib.sha256(file.read_bytes()).hexdigest()
        assert mine == hashlib.sha256((tmp_path / "again" / file.name).read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pruned": (1.2,)}, "between 0 and 1"),
        ({"pruned": ()}, "between 0 and 1"),
        ({"method": "fischer"}, "Did you mean 'fisher'"),
        ({"allocate": "globl"}, "Did you mean 'global'"),
        ({"samples": 0}, "samples must be at least 1"),
        ({"batch_size": 0}, "batch size must be at least 1"),
        ({"seq_len": 1}, "seq_len must be from 2"),
        ({"quantum": 64}, "wider than an expert"),
        ({"data": "nowhere.txt"}, "does not exist"),
        ({"method": "magnitude"}, "samples, seq_len without effect"),
        ({"learn": LearnConfig()}, "no effect with allocate 'global'"),
        ({"device": "cuda:99"}, "CUDA devices"),
        ({"device": "gpu"}, "no device 'gpu'"),
        ({"quantum": 0}, "quantum must be at least 1"),
        ({"seq_len": 65}, "context of 64 tokens"),
    ],
)
def test_what_cannot_work_is_refused_and_leaves_nothing(made, tmp_path, change, message):
    base, _, _ = made("mixtral")
    with pytest.raises(FlexmoeError, match=message):
        flexmoe.compress(base, tmp_path / "out", config(**change))
    assert list(tmp_path.iterdir()) == []


def test_a_dense_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(small).save_pretrained(tmp_path / "dense")
    with pytest.raises(FlexmoeError, match="no routed experts found in LlamaForCausalLM"):
        flexmoe.compress(tmp_path / "dense", tmp_path / "out", config())


def test_misuse_of_what_was_made_is_refused(made, tmp_path):
    base, family, plan = made("mixtral")
    _, other, _ = made("olmoe")
    with pytest.raises(FlexmoeError, match=r"the nearest is 0\.6"):
        flexmoe.load(family, pruned=0.7)
    with pytest.raises(FlexmoeError, match="leave base out"):
        flexmoe.load(family, base=base)
    with pytest.raises(FlexmoeError, match="is no plan"):
        flexmoe.load(base, base=base)
    with pytest.raises(FlexmoeError, match=r"cannot be opened at 0\.4"):
        flexmoe.load(base, pruned=0.4)
    with pytest.raises(FlexmoeError, match="this model has no budgets"):
        flexmoe.set_budget(AutoModelForCausalLM.from_pretrained(base), 0.4)
    plan.save(tmp_path / "plan")
    with pytest.raises(FlexmoeError, match=r"of another model.*model_type 'mixtral'"):
        flexmoe.load(tmp_path / "plan", base=other)
    done = flexmoe.export(family, tmp_path / "ragged", pruned=0.4, layout="ragged")
    assert flexmoe.load(done.path, pruned=0.4) is not None
    with pytest.raises(FlexmoeError, match=r"pruned 0\.4, and cannot be opened at 0\.2"):
        flexmoe.load(done.path, pruned=0.2)
    assert json.loads((done.path / "flexmoe_export.json").read_text())["layout"] == "ragged"
