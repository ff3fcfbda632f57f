"""Statistics by source: sums, mixtures without another pass, coverage, the file."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from flexmoe.cli import app
from flexmoe.coverage import coverage, in_short
from flexmoe.data import TINY, calibration_windows, load_tokenizer
from flexmoe.errors import FlexmoeError
from flexmoe.evidence import FILE_NAME, Evidence, gather
from flexmoe.experts import expert_layers
from flexmoe.family import load_stock
from flexmoe.methods import find_method, score_layers
from flexmoe.observe import observe
from flexmoe.pipeline import CompressConfig, compress
from flexmoe.plan import Plan
from flexmoe.reweigh import reweigh
from flexmoe.routing.rules import MEAN, mean_outputs

NAMES = ("fisher_EI", "energy_max_EI")
CONFIG = CompressConfig(
    data="books.train,code.train", samples=16, seq_len=24, pruned=(0.3, 0.6), allocate="global",
    device="cpu",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load_stock(TINY / "model", dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def windows(model):
    tokenizer = load_tokenizer(TINY / "model", model.config)
    return calibration_windows(
        "books.train:3,code.train:1", tokenizer, samples=8, seq_len=24, seed=0
    )


@pytest.fixture(scope="module")
def evidence(model, windows):
    return gather(model, windows, NAMES, batch_size=4)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    out = tmp_path_factory.mktemp("evidence") / "family"
    compress("tiny", out, CONFIG)
    return out


def test_every_source_has_its_own_sums(model, windows, evidence):
    for s, name in enumerate(windows.sources):
        alone = observe(model, windows.ids[windows.source_n == s], NAMES, batch_size=4)
        for i, stats in alone.items():
            for key, value in stats.values.items():
                assert torch.equal(evidence.sources[name][i][key], value)
            assert evidence.sources[name][i].tokens == stats.tokens == (6, 2)[s] * 24
    together = observe(model, windows.ids, NAMES, batch_size=4)
    for i, stats in evidence.mixed().items():
        assert stats.tokens == together[i].tokens and stats.experts_per_token == 4
        for key, value in stats.values.items():  # float32 products of other batches
            assert torch.allclose(value, together[i][key], rtol=1e-4, atol=1e-9), key


def test_the_last_step_is_written_once(model, windows):
    steps = []
    saved = SimpleNamespace(
        due=True, load=lambda: None, save=lambda step, tensors: steps.append(step)
    )
    gather(model, windows, ("count_E",), batch_size=4, saved=saved)
    assert steps == [1, 2, 3]  # 6 windows of books in two batches, 2 of code


def test_a_mixture_weighs_sums_by_tokens_and_leaves_maxima(evidence):
    books, code = (evidence.sources[f"{name}.train"] for name in ("books", "code"))
    mixed = evidence.mixed({"books.train": 1, "code.train": 3})  # of 3 : 1
    for i, stats in mixed.items():
        want = books[i]["fisher_EI"] * (48 / 144) + code[i]["fisher_EI"] * (144 / 48)
        assert torch.allclose(stats["fisher_EI"], want, rtol=1e-12)
        largest = torch.maximum(books[i]["energy_max_EI"], code[i]["energy_max_EI"])
        assert torch.equal(stats["energy_max_EI"], largest)
        assert (stats.tokens, stats.batches) == (192, 4)  # 2 batches of books, 1 of code
    same = evidence.mixed({"books.train": 3, "code.train": 1})
    for i, stats in evidence.mixed().items():
        assert all(torch.equal(v, same[i][key]) for key, v in stats.values.items())


def test_the_file_gives_back_what_was_saved_and_refuses_any_damage(evidence, tmp_path):
    evidence.save(tmp_path)
    again = Evidence.load(tmp_path, evidence.data_sha256)
    assert list(again.sources) == list(evidence.sources)
    for name, statistics in evidence.sources.items():
        for i, stats in statistics.items():
            found = again.sources[name][i]
            assert (found.tokens, found.batches) == (stats.tokens, stats.batches)
            assert all(torch.equal(v, found[key]) for key, v in stats.values.items())
    with pytest.raises(FlexmoeError, match="of other data"):
        Evidence.load(tmp_path, "0" * 64)
    content = (tmp_path / FILE_NAME).read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(content), (24,), generator=generator).tolist()
    for at in [0, 9, 30, *places, len(content) - 1]:
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        (tmp_path / FILE_NAME).write_bytes(damaged)
        with pytest.raises(FlexmoeError):
            Evidence.load(tmp_path, evidence.data_sha256)
    (tmp_path / FILE_NAME).unlink()
    with pytest.raises(FlexmoeError, match="keeps no statistics"):
        Evidence.load(tmp_path, evidence.data_sha256)


@pytest.mark.parametrize("method", ["fisher", "camera"])  # camera reads weights as well
def test_the_same_mixture_gives_the_same_plan_and_another_one_another(tmp_path, method):
    out = tmp_path / "family"
    before = compress("tiny", out, dataclasses.replace(CONFIG, method=method))
    same, _ = reweigh(out, "books.train:2,code.train:2", tmp_path / "same")
    other, _ = reweigh(out, f"{TINY}/code.train.jsonl.gz", tmp_path / "other")
    assert all(torch.equal(before.order[i], same.order[i]) for i in before.order)
    assert all(torch.equal(before.width[i], same.width[i]) for i in before.width)
    assert any(not torch.equal(before.width[i], other.width[i]) for i in before.width)
    kept = Plan.load(tmp_path / "other")
    assert kept.recipe.settings["reweighed"].endswith("code.train.jsonl.gz")
    assert kept.recipe.weights_sha256 == before.recipe.weights_sha256


@pytest.mark.parametrize("name", ["reap", "man", "msan", "heapr", "seap", "moe-slimming-saliency"])
def test_means_do_not_depend_on_how_much_of_a_source_counts(model, windows, name):
    """Also where an expert saw one token, of which a mixture takes a third."""
    method = find_method(name)
    layers = expert_layers(model)
    statistics = observe(model, windows.ids[:1], (*method.needs, *MEAN), batch_size=4)
    assert any(1 in stats["count_E"].tolist() for stats in statistics.values())
    third = {i: stats.scaled(1 / 3) for i, stats in statistics.items()}
    whole, part = (score_layers(method, layers, each) for each in (statistics, third))
    for i, score in whole.items():  # that of MoE-Slimming may have a factor for the layer
        assert torch.allclose(score / score.sum(), part[i] / part[i].sum(), rtol=1e-6)
    want, found = mean_outputs(statistics), mean_outputs(third)
    assert all(torch.allclose(want[i], found[i], rtol=1e-6) for i in want)
    assert all(torch.isfinite(found[i]).all() for i in found)


def test_the_command_makes_a_plan_of_the_base_model(family, tmp_path):
    command = f"reweigh {family} --data code.train:3,books.train:1 -o {tmp_path}/plan"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert "coverage: of 384 tokens" in result.output
    again = CliRunner().invoke(app, command.split())
    assert "exists already" in str(again.exception)
    command = f"eval {tmp_path}/plan --pruned 0.3 --data code.valid --samples 1 --seq-len 24"
    assert CliRunner().invoke(app, command.split()).exit_code == 0


@pytest.mark.parametrize(
    ("data", "settings", "message"),
    [
        ("code.tran", {}, r"Did you mean 'code\.train'"),
        ("code.train,code.train", {}, "given twice"),
        ("code.train:0", {}, "above 0"),
        ("", {}, "empty"),
        ("code.train", {"allocator": "learned"}, "needs a run"),
        ("code.train", {"allocator": "globl"}, "Did you mean 'global'"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(family, tmp_path, data, settings, message):
    with pytest.raises(FlexmoeError, match=message):
        reweigh(family, data, tmp_path / "plan", **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recovery": [{"mode": "full"}]}, "has recovered weights"),
        ({"method": "diep"}, "needs more than sums"),  # learns
        ({"method": "router-change"}, "needs more than sums"),  # reads a second checkpoint
        ({"method": "peu"}, "needs more than sums"),  # two passes
    ],
)
def test_families_that_do_not_rest_on_sums_are_refused(family, tmp_path, change, message):
    plan = Plan.load(family)
    recipe = plan.recipe.model_copy(update=change)
    dataclasses.replace(plan, recipe=recipe).save(tmp_path / "family", ranked=True)
    with pytest.raises(FlexmoeError, match=message):
        reweigh(tmp_path / "family", "code.train", tmp_path / "plan")


def test_coverage_counts_tokens_by_layer_and_source(windows, evidence):
    rows = coverage(evidence)
    assert [row.layer for row in rows] == [0, 1, 2, 3]
    for row in rows:
        count_E = evidence.mixed()[row.layer]["count_E"]
        assert (row.tokens, row.experts) == (192, 16)
        assert row.least == count_E.min() and row.most == count_E.max()
        assert row.median == count_E.sort().values[7:9].mean()
        assert list(row.thin) == [e for e, n in enumerate(count_E.tolist()) if n < 100]
    parts = [coverage(evidence, name) for name in windows.sources]
    assert [part[0].tokens for part in parts] == [144, 48]
    json.dumps([dataclasses.asdict(row) for row in rows])  # plain data
    text, thin = in_short(rows)
    number = sum(len(row.thin) for row in rows)
    assert thin and f"{number} of 64 experts" in text and "their order is a guess" in text
    fine = [dataclasses.replace(row, thin=()) for row in rows]
    assert in_short(fine)[1] is False and "0 of 64 experts (0%)" in in_short(fine)[0]
