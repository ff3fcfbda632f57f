"""The commands eval (with pairs and a saved curve) and pick, end to end on the shipped model."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flexmoe.cli import app, main
from flexmoe.cli.eval import _command as words
from flexmoe.data import TINY
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.compared import compare
from flexmoe.evaluation.curve import load_curve, stale
from flexmoe.evaluation.evaluate import EvaluateConfig, measure
from flexmoe.exporter import export, rank_checkpoint
from flexmoe.family import load, load_stock
from flexmoe.plan import Plan
from helpers import random_plan
from minimal import made_pairs, write_pairs

FOLDER = Path(__file__).parent / "offline_task"
SMALL = {"data": "books.valid,math.valid", "samples": 3, "seq_len": 32}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", made_pairs(16))


@pytest.fixture(scope="module")
def plan():
    return random_plan(load_stock("tiny", device="cpu"), TINY / "model", (0.0, 0.2, 0.4))


@pytest.fixture
def family(plan, tmp_path):
    out = tmp_path / "family"
    plan.save(out, ranked=True)
    rank_checkpoint(TINY / "model", plan, out)
    return out


def run(command: str):
    return CliRunner().invoke(app, command.split())


def options(settings=SMALL) -> str:
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def test_eval_saves_a_curve_that_pick_reads(family, pairs, tmp_path):
    out = tmp_path / "rows.json"
    result = run(
        f"eval {family} {options()} --pairs {pairs} --pairs-per-paradigm 6 --pruned 0.2,0.4 "
        f"--save --json {out}"
    )
    assert result.exit_code == 0, result.output
    assert "increase" in result.output and "12 pairs" in result.output
    written = json.loads(out.read_text())
    assert [row["pruned"] for row in written["budgets"]] == [0.0, 0.2, 0.4]  # 0 is measured, too
    assert written["rows"] == json.loads(json.dumps(measure(family, EvaluateConfig(**SMALL)).rows))

    curve = load_curve(family)
    assert list(curve.files) == ["books.valid", "math.valid"]
    assert curve.files["math.valid"].windows == 3 and curve.files["math.valid"].seq_len == 32
    assert curve.pairs.name == "pairs.jsonl" and curve.pairs.per_paradigm == 6
    assert str(tmp_path) not in (family / "evaluation.json").read_text()
    point = curve.budgets[-1]
    assert point.nll == pytest.approx(sum(point.files.values()) / 2)
    assert point.increase_interval[0] < point.increase < point.increase_interval[1]
    assert point.pairs.n == 12 and point.pairs.ratio > 0

    share = point.kept
    result = run(f"pick {family} --keep {share * 0.999}")
    assert result.exit_code == 0, result.output
    assert "at 40 % pruned" in result.output and "weights only" in result.output
    assert f"flexmoe export {family} --pruned 0.4 --layout ragged" in result.output
    result = run(f"pick {family} --memory {point.bytes} --json")
    found = json.loads(result.stdout)
    assert found["pruned"] == 0.4 and found["bytes"] == point.bytes
    assert found["quality"]["kept"] == share


def test_pairs_that_are_not_finite_do_not_cost_what_else_was_measured(
    family, pairs, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "flexmoe.evaluation.pairs.sequence_scores",
        lambda model, sequences: torch.full((len(sequences),), math.nan).double(),
    )
    out = tmp_path / "rows.json"
    result = run(f"eval {family} {options()} --pairs {pairs} --pruned 0.4 --save --json {out}")
    assert "the curve is not saved: accuracy is nan" in str(result.exception)
    assert "increase" in result.output and "16 pairs" in result.output
    row = json.loads(out.read_text())["budgets"][-1]
    assert row["increase"] > 0 and math.isnan(row["pairs"]["accuracy"])


def test_everything_at_once_is_printed_and_saved(family, pairs, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(FOLDER)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    asked = tmp_path / "prompts.jsonl"
    asked.write_text('{"prompt": "The captain"}\n{"prompt": "{"}\n')
    out = tmp_path / "all.json"
    result = run(
        f"eval {family} {options()} --pruned 0.4 --save --json {out} --pairs {pairs} --tasks "
        f"agreement.yaml --task-limit 8 --generate data --generate-limit 3 --json-prompts {asked} "
        "--max-new-tokens 12 --min-recovery 0.9999"
    )
    assert result.exit_code == 1, result.output
    assert "the smallest that passes is the one at 0 % pruned" in result.output
    for word in ("same top-1", "by file", "agreement", "sampled", "never end", "tool calls"):
        assert word in result.output

    curve, written = load_curve(family), json.loads(out.read_text())
    whole, point = curve.budgets
    assert (whole.kl, whole.agreement) == (0, 1)
    assert point.kl_interval[0] < point.kl < point.kl_interval[1]
    assert set(point.by_file) == set(point.files) and point.by_file["math.valid"].increase > 0
    assert point.tasks["agreement"].n == 8 and point.tasks["agreement"].ratio > 0
    assert set(point.generation) == {"greedy", "sampled"}
    assert point.generation["greedy"].endless.n == 3 and point.structured.text.n == 2
    assert curve.generation.name == "data" and curve.generation.settings["greedy"]
    assert curve.structured.name == "prompts.jsonl" and curve.structured.n == 2
    assert list(curve.tasks.files) == ["agreement.yaml"] and "lm_eval" in curve.versions
    assert str(tmp_path) not in (family / "evaluation.json").read_text()
    saved = json.loads((family / "evaluation.json").read_text())
    assert {name: written[name] for name in ("date", "files", "hardware", "generation")} == {
        name: saved[name] for name in ("date", "files", "hardware", "generation")
    }
    assert written["budgets"][1]["generation"] == saved["budgets"][1]["generation"]
    assert run(f"pick {family} --keep 0.5 --by tasks").exit_code == 0


def test_an_export_beside_its_base_is_as_the_family_says(family, tmp_path, monkeypatch):
    export(family, tmp_path / "member", pruned=0.4, layout="ragged")
    (whole, of_family) = measure(family, EvaluateConfig(**SMALL, pruned=(0.0, 0.4))).members
    found = {}
    for together in (True, False):
        monkeypatch.setattr(
            "flexmoe.evaluation.compared.fit_together", lambda *_, fit=together: fit
        )
        found[together] = measure(tmp_path / "member", EvaluateConfig(**SMALL, against="tiny"))
        (row,) = found[together].members
        assert row["pruned"] == 0.4 and found[together].against["model"] == "tiny"
        assert found[together].against["nll"] == pytest.approx(whole["nll"], rel=1e-6)
        for name in ("nll", "increase", "kept", "kl", "agreement"):
            # float32 sums of matrices of other widths
            assert row[name] == pytest.approx(of_family[name], rel=1e-4), name
    result = run(f"eval {tmp_path}/member {options()} --against tiny --min-recovery 0.1")
    assert result.exit_code == 0 and "all measured budgets keep at least 0.1" in result.output
    result = run(f"eval {tmp_path}/member {options()} --against {family} --min-recovery 0.999")
    assert result.exit_code == 1 and "no measured budget passes" in result.output


def test_a_family_of_other_weights_is_compared_with_the_original(family):
    """As after a recovery: budget 0 is no longer the model that the family is from."""
    weights = load_file(family / "model.safetensors")
    weights["model.norm.weight"] *= 1.5
    save_file(weights, family / "model.safetensors", {"format": "pt"})
    config = EvaluateConfig(**SMALL, pruned=(0.4,), against="tiny", save=True)
    measure(family, config)
    curve = load_curve(family)
    assert curve.against.model == "tiny" and [p.pruned for p in curve.budgets] == [0.4]
    assert curve.budgets[0].kl > 0 and curve.budgets[0].increase == pytest.approx(
        curve.budgets[0].nll - curve.against.nll
    )


def test_layers_that_do_not_fit_are_read_from_disk(family, tmp_path, monkeypatch):
    """On a machine that has memory for one of the four layers."""
    most = "transformers.integrations.accelerate.get_max_memory"
    monkeypatch.setattr(most, lambda given=None: {"cpu": 7_000_000})
    spread = load(family, device="spread", dtype=torch.float32)
    assert {"cpu", "disk"} == set(spread.hf_device_map.values())
    assert any(parameter.is_meta for parameter in spread.parameters())
    found = {}
    for device in ("cpu", "spread"):
        out = tmp_path / f"{device}.json"
        result = run(f"eval {family} {options()} --pruned 0.4 --device {device} --json {out}")
        assert result.exit_code == 0, result.output
        found[device] = [row["nll"] for row in json.loads(out.read_text())["rows"]]
    assert found["cpu"] == found["spread"]
    alone = Plan.load(family)
    alone.save(tmp_path / "plan")
    with pytest.raises(FlexmoeError, match="parts are on disk"):
        load(tmp_path / "plan", base="tiny", device="spread", dtype=torch.float32)
    for command in (f"compress tiny -o {tmp_path / 'x'}", f"recover {family} -o {tmp_path / 'x'}"):
        result = run(f"{command} --device spread")
        assert isinstance(result.exception, FlexmoeError) and "--memory" in str(result.exception)


def test_a_curve_of_the_first_version_is_read(family):
    """What was added since may be absent."""
    measure(family, EvaluateConfig(**SMALL, pruned=(0.4,), save=True))
    path = family / "evaluation.json"
    found = json.loads(path.read_text())
    for name in ("command", "tasks", "generation", "structured", "against", "sha256"):
        del found[name]
    for row in found["budgets"]:
        for name in ("nll_interval", "by_file", "tasks", "generation", "structured", "kl",
                     "kl_interval", "agreement", "agreement_interval"):  # fmt: skip
            del row[name]
    path.write_text(json.dumps(found))
    assert load_curve(family).budgets[1].kl is None
    assert run(f"pick {family} --keep 0.1").exit_code == 0


def test_a_curve_goes_stale_with_the_weights(family):
    measure(family, EvaluateConfig(**SMALL, pruned=(0.4,), save=True))
    curve = load_curve(family)
    assert stale(curve, family) is None
    (family / "config.json").touch()
    assert stale(curve, family) is None
    weights = load_file(family / "model.safetensors")
    name = next(name for name in weights if "norm" in name)
    weights[name][0] += 1  # the size of the file stays
    save_file(weights, family / "model.safetensors", {"format": "pt"})
    assert "weights in" in stale(curve, family)


def test_a_plan_alone_has_a_curve_too(plan, tmp_path):
    plan.save(tmp_path)
    done = measure(tmp_path, EvaluateConfig(**SMALL, save=True))
    assert done.saved == tmp_path / "evaluation.json"
    assert [member["pruned"] for member in done.members] == [0.0, 0.2, 0.4]
    assert stale(load_curve(tmp_path), tmp_path) is None


def test_one_model_without_budgets_and_a_budget_without_its_base(family, pairs):
    done = measure("tiny", EvaluateConfig(**SMALL, pairs=pairs))
    (row,) = done.members
    assert done.saved is None and row["pairs"]["n"] == 16 and row["pairs"]["accuracy"] > 0.8
    (row,) = measure(family, EvaluateConfig(**SMALL, pruned=(0.4,), pairs=pairs)).members
    assert "increase" not in row and row["pairs"]["ratio"] is None
    result = run(f"eval {family} {options()} --pruned 0.4 --pairs {pairs}")
    assert result.exit_code == 0, result.output
    assert "compared with nothing" in result.output


def test_a_base_that_has_no_effect_is_refused_before_anything_is_measured(family):
    for path, message in ((family, "leave base out"), (TINY / "model", "is no plan")):
        with pytest.raises(FlexmoeError, match=message):
            compare(path, base="tiny", against="tiny", device="cpu")


def test_a_loss_that_is_no_number_is_not_saved(family):
    weights = load_file(family / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, family / "model.safetensors", {"format": "pt"})
    out = family.parent / "rows.json"
    result = run(f"eval {family} {options()} --pruned 0.4 --save --json {out}")
    assert "the curve is not saved: nll is nan" in str(result.exception)
    assert not (family / "evaluation.json").exists()
    assert "perplexity" in result.output and len(json.loads(out.read_text())["budgets"]) == 2


def test_a_word_too_long_for_a_path_is_an_option(monkeypatch):
    long = ",".join(["a" * 60] * 90)
    monkeypatch.setattr(sys, "argv", [str(TINY / "model"), long])
    assert words() == f"model {long}"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("eval tiny --save", "is no local one"),
        ("eval MODEL --save", "no budgets to save a curve of"),
        ("eval tiny --pairs nowhere.jsonl", "pairs file 'nowhere.jsonl' does not exist"),
        ("eval tiny --pairs-per-paradigm 3", "no effect without --pairs"),
        ("eval PLAN --pairs PAIRS --pairs-per-paradigm 0", "at least 1, found 0"),
        ("eval PLAN --pruned 0.7 --save", "the nearest is 0.4"),
        ("eval PLAN --against nowhere", "nowhere"),
        ("eval PLAN --json PLAN", "it is a folder"),
        ("eval PLAN --json PAIRS/rows.json", "cannot write"),
        ("eval MODEL --min-recovery 0.9", "give the model it is from with --against"),
        ("eval PLAN --min-recovery 95", "95 % is 0.95"),
        ("eval PLAN --min-recovery 0.9 --by pair", "Did you mean 'pairs'"),
        ("eval PLAN --min-recovery 0.9 --by pairs", "needs --pairs"),
        ("eval PLAN --min-recovery 0.9 --by tasks", "needs --tasks"),
        ("eval MODEL --router keep", "is one member: --router has no effect on it"),
        ("eval PLAN --router keep", "the plan removes no whole experts"),
        ("eval PLAN --by pairs --pairs PAIRS", "--by has no effect without --min-recovery"),
        ("eval PLAN --task-limit 3", "no effect without --tasks"),
        ("eval PLAN --tasks ./nowhere.yaml", "there is no task './nowhere.yaml'"),
        ("eval PLAN --generate nowhere.jsonl", "prompts file 'nowhere.jsonl' does not exist"),
        ("eval PLAN --generate-limit 3", "no effect without --generate"),
        ("eval PLAN --max-new-tokens 3", "no effect without --generate or --json-prompts"),
        ("eval PLAN --generate data --max-new-tokens 2000", "lower --max-new-tokens"),
        ("pick tiny --keep 0.9", "not a flexmoe family or plan"),
        ("pick PLAN", "give --keep 0.95"),
        ("pick PLAN --keep 0.9", "has no saved curve"),
        ("pick PLAN --keep 95", "95 % is 0.95"),
        ("pick PLAN --memory 24G", "such as 24GiB"),
        ("pick PLAN --params 1K", "the smallest is the one at 40 % pruned"),
        ("pick nowhere --keep 0.9", "nowhere"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(
    plan, pairs, command, message, capsys, monkeypatch, tmp_path
):
    plan.save(tmp_path / "plan")
    places = {"MODEL": TINY / "model", "PAIRS": pairs, "PLAN": tmp_path / "plan"}
    words = ["/".join(str(places.get(w, w)) for w in word.split("/")) for word in command.split()]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flexmoe", *words])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.splitlines()) < 10
    assert not (tmp_path / "plan" / "evaluation.json").exists()
