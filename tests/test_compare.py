"""flexmoe compare: rows equal what compress and eval give, runs go on, what is refused."""

import json
import re
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flexmoe import CompressConfig, FlexmoeError, compress
from flexmoe.checkpoint import meta_model
from flexmoe.cli import app
from flexmoe.comparison.entries import chosen, parse
from flexmoe.comparison.inputs import CompareConfig
from flexmoe.comparison.results import Results, read
from flexmoe.comparison.run import _check, _check_asked, _those, compare
from flexmoe.comparison.tables import as_good, best_first, markdown
from flexmoe.evaluation.evaluate import measure
from flexmoe.evaluation.inputs import EvaluateConfig
from flexmoe.experts import expert_layers
from flexmoe.family import load_stock
from flexmoe.headers import resolve
from flexmoe.methods import all_methods, find_method
from minimal import made_pairs, write_pairs

SMALL = {"samples": 4, "seq_len": 32, "eval_samples": 3, "evaluate": "books.valid,math.valid"}


def test_entries_are_read_and_baselines_added():
    entry = parse("fisher@global")
    assert (entry.spec, entry.allocate, entry.router) == ("fisher", "global", "keep")
    assert parse("reap").router == "remove" and parse("mone").router == "constant"
    assert parse("reap@layer+keep").name == "reap+keep"
    assert parse("docs/my_method.py:score@layer").name == "reach@layer"
    assert [e.name for e in chosen(["heapr"])] == ["heapr", "random"]
    assert [e.name for e in chosen(["reap", "reap+remove"])] == ["reap", "random-experts"]
    assert {e.name for e in chosen(["all"])} >= all_methods().keys() - {"reach"}
    for wrong, why in {
        "reep": "Did you mean 'reap'",
        "reap@layers": "Did you mean 'layer'",
        "reap+kept": "Did you mean 'keep'",
    }.items():
        with pytest.raises(FlexmoeError, match=why):
            parse(wrong)
    with pytest.raises(FlexmoeError, match="no method to compare"):
        chosen([])


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    pairs = write_pairs(folder / "pairs.jsonl", made_pairs(12))
    methods = ("heapr", "camera", "reap", "reap+keep", "mone", "aimer", "diep")
    config = CompareConfig(methods=methods, pruned=(0.25, 0.5), pairs=pairs, **SMALL)
    return compare("tiny", folder / "all.jsonl", config), config


@pytest.mark.parametrize("name", ["heapr", "reap", "reap+keep", "mone", "camera", "diep"])
def test_a_row_is_what_compress_and_eval_give(name, compared, tmp_path):
    """The same plan, though others were made on the same model before; the same losses."""
    results, config = compared
    entry = parse(name)
    own = CompressConfig(
        method=entry.spec, router=entry.router, pruned=(0.25, 0.5), samples=4, seq_len=32
    )
    compress("tiny", tmp_path / "family", own)
    held = EvaluateConfig(
        data=config.evaluate, samples=3, seq_len=32, pruned=(0.0, 0.25, 0.5), pairs=config.pairs
    )
    done = measure(tmp_path / "family", held)
    rows = {row["pruned"]: row for row in results.rows if row["method"] == name}
    for want in done.members[1:]:
        row = rows[want["pruned"]]
        for figure in ("achieved", "routed_parameters", "active_parameters", "bytes"):
            assert row[figure] == pytest.approx(want[figure])
        assert row["nll"] == pytest.approx(want["nll"], abs=1e-4)
        assert row["increase"] == pytest.approx(want["increase"], abs=1e-4)
        assert row["increase_interval"] == pytest.approx(want["increase_interval"], abs=1e-4)
        assert row["pairs"]["accuracy"] == want["pairs"]["accuracy"]
    assert results.base["nll"] == pytest.approx(done.members[0]["nll"], abs=1e-5)


def test_the_random_ones_are_there_and_costs_are_told(compared):
    results, _ = compared
    rows = {(row["method"], row["pruned"]): row for row in results.rows}
    assert {name for name, _ in rows} >= {"random", "random-experts"}
    assert rows["random", 0.5]["calibration"]["seconds"] == 0
    assert rows["reap", 0.5]["calibration"]["shared_by"] == 4  # camera, reap twice, mone
    assert rows["heapr", 0.5]["calibration"]["cost"] == "backward"
    assert rows["diep", 0.5]["calibration"]["cost"] == "training"
    assert rows["diep", 0.5]["plan_seconds"] > rows["heapr", 0.5]["plan_seconds"]
    assert rows["reap", 0.5]["active_parameters"] > rows["reap+keep", 0.5]["active_parameters"]
    for row in results.rows:
        assert row["calibration"]["most_held"] > 1e7 and len(row["windows"]["math.valid"]) == 3


def test_a_killed_run_goes_on_and_others_are_refused(tmp_path):
    path = tmp_path / "r.jsonl"
    config = CompareConfig(methods=("aimer",), pruned=(0.25,), **SMALL)
    compare("tiny", path, config)
    whole = path.read_text()
    path.write_text(whole[:-200])  # killed while it wrote
    assert len(read(path).rows) == 1
    compare("tiny", path, config)
    # a row is the same but for what it took
    same = [
        re.sub(r'"calibration": {.*?}|"plan_seconds": [^,]*', "", t)
        for t in (whole, path.read_text())
    ]
    assert same[0] == same[1]
    assert compare("tiny", path, config).path.read_text() == path.read_text()  # nothing to do

    more = CompareConfig(methods=("aimer", "man"), pruned=(0.25, 0.5), **SMALL)
    results = compare("tiny", path, more)
    assert len(results.rows) == 6 and path.read_text().startswith(whole[:1000])
    for other in ({"seed": 1}, {"samples": 5}, {"eval_samples": 2}):
        changed = CompareConfig(methods=("aimer",), pruned=(0.25,), **SMALL | other)
        with pytest.raises(FlexmoeError, match="holds results of another comparison"):
            compare("tiny", path, changed)
    (tmp_path / "other").write_text("hello\n")
    with pytest.raises(FlexmoeError, match="is no file of flexmoe compare"):
        compare("tiny", tmp_path / "other", config)


@pytest.mark.parametrize(
    ("spec", "asked", "shares", "refused"),
    [
        ("rco", {"asked": [0.25, 0.5]}, (0.5, 0.25), False),  # the run goes on
        ("rco", {"asked": [0.25, 0.5]}, (0.25,), False),  # it is there
        ("rco", {"asked": [0.25]}, (0.25, 0.5), True),
        ("rco", {}, (0.25, 0.5), True),  # a row from before that was kept
        ("heapr@rco", {}, (0.25, 0.5), True),
        ("heapr", {}, (0.25, 0.5), False),
    ],
)
def test_budgets_are_not_added_where_they_share_a_run(spec, asked, shares, refused):
    entry = parse(spec)
    results = Results(Path("r"), {}, [{"method": entry.name, "pruned": 0.25, **asked}])
    expected = pytest.raises(FlexmoeError, match="share the steps") if refused else nullcontext()
    with expected:
        _check_asked(entry, results, CompareConfig(methods=(spec,), pruned=shares))


def test_the_model_is_as_before_after_every_entry(monkeypatch, tmp_path):
    loaded = []

    def keep(*args, **kwargs):
        loaded.append(load_stock(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr("flexmoe.comparison.run.load_stock", keep)
    methods = ("heapr", "reap", "mone", "fisher@layer")
    compare("tiny", tmp_path / "r", CompareConfig(methods=methods, pruned=(0.5,), **SMALL))
    want = load_stock("tiny").state_dict()
    found = loaded[0].state_dict()
    assert found.keys() == want.keys() and all(torch.equal(found[n], want[n]) for n in want)
    assert not hasattr(loaded[0], "flexmoe_plan")
    for layer in expert_layers(loaded[0]):
        assert not any(name.startswith("flexmoe_renumber") for name in vars(layer.module))
        assert layer.E == 16


def test_results_of_an_older_version_are_gone_on_with(tmp_path):
    Results.open(tmp_path / "r.jsonl", {"weights_sha256": "b", "seed": 0})
    Results.open(tmp_path / "r.jsonl", {"weights_sha256": "a:b", "seed": 0})
    with pytest.raises(FlexmoeError, match="weights_sha256 was"):
        Results.open(tmp_path / "r.jsonl", {"weights_sha256": "a:c", "seed": 0})


def test_those_that_cannot_run_are_left_out_of_all_and_refused_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr("flexmoe.statistics.MOST", 15)
    said = []
    config = CompareConfig(methods=("all",), pruned=(0.5,), **SMALL)
    meta = meta_model(resolve("tiny"))
    found = _those(chosen(("all",)), lambda e: _check(e, meta, config), config, said.append)
    assert {e.name for e in found} == {e.name for e in chosen(("all",))} - {"naee", "router-change"}
    assert "all their subsets can be tried up to 15" in said[0]
    for name, why in {
        "naee": "all their subsets can be tried up to 15",
        "router-change": "compares with a second checkpoint",
        "heapr+remove": "'remove' is of whole experts",
        "reap@uniform": "scores whole experts",
    }.items():
        with pytest.raises(FlexmoeError, match=why):
            compare("tiny", tmp_path / "x", CompareConfig(methods=(name,), pruned=(0.5,), **SMALL))
        assert not (tmp_path / "x").exists()


def test_who_cannot_be_told_from_the_best(compared):
    results, _ = compared
    rows = best_first(results, 0.5)
    good = as_good(rows)
    assert rows[0]["method"] in good and "random" not in good
    assert as_good([{**rows[0], "increase": None}]) == set()
    text = markdown(results)
    assert f"{rows[0]['method']}\\*" in text and "increase by file" in text


def test_as_good_is_who_is_not_worse_on_the_same_windows():
    def row(name, *windows):
        increase = sum(windows) / len(windows)
        return {"method": name, "increase": increase, "files": {"a": 0}, "windows": {"a": windows}}

    best, close = row("best", 1, 2, 3, 4), row("close", 1.2, 1.9, 3.1, 3.9)
    worse = row("worse", 1.1, 2.1, 3.1, 4.1)  # little, but in every window
    assert as_good([worse, close, best]) == {"best", "close"}
    assert as_good([row("alone", 1)]) == set()  # one window has no interval


def test_pairs_that_are_not_finite_are_said(compared):
    results, _ = compared
    none = {"n": 12, "accuracy": None, "interval": None}
    lines = [{**line, "pairs": none} for line in (results.base, results.rows[0])]
    text = markdown(Results(results.path, results.settings, lines))
    assert "| not finite |" in text and "base not finite" in text


@pytest.mark.parametrize("name", ["p.xyz", "p"])
def test_a_plot_of_an_unknown_kind_is_refused_at_once(name, tmp_path):
    out, plot = tmp_path / "r.jsonl", tmp_path / "new" / name
    command = f"compare tiny --methods aimer --pruned 0.5 --json {out} --plot {plot}"
    result = CliRunner().invoke(app, command.split())
    assert isinstance(result.exception, FlexmoeError) and "such as p.png" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("measured", [{"method_sha256": "old"}, {}])
def test_an_edited_method_is_not_taken_for_measured(tmp_path, measured):
    row = {"method": "mine", "pruned": 0.5, **measured}
    results = Results(tmp_path / "r.jsonl", {}, [row])
    for share in (0.5, 0.25):
        with pytest.raises(FlexmoeError, match="another version of its file: give another --json"):
            results.done("mine", share, "new")
        assert results.done("mine", share, row.get("method_sha256", "")) == (share == 0.5)


def test_on_the_command_line(tmp_path):
    out, plot, page = (tmp_path / name for name in ("r.jsonl", "p.png", "t.md"))
    command = (
        f"compare tiny --methods aimer,docs/my_method.py:score@layer --pruned 0.5 --samples 4 "
        f"--seq-len 32 --eval books.valid --eval-samples 3 --json {out} --plot {plot} "
        f"--markdown {page}"
    )
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    for word in ("aimer", "reach@layer", "random-experts", "remove", "no data", "Base loss"):
        assert word in result.output
    assert plot.stat().st_size > 10_000 and "| aimer" in page.read_text()
    assert json.loads(out.read_text().splitlines()[0])["settings"]["model"] == "tiny"
    (mine,) = (row for row in read(out).rows if row["method"] == "reach@layer")
    assert mine["method_sha256"] == find_method("docs/my_method.py:score").sha256
    again = CliRunner().invoke(app, [*command.split(), "--pairs-per-paradigm", "3"])
    assert isinstance(again.exception, FlexmoeError) and "no effect" in str(again.exception)
