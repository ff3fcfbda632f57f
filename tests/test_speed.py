"""``flexmoe bench model``: every budget and what it is compared with, measured in one run."""

import json
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

import flexmoe
from flexmoe import speed
from flexmoe.cli import app
from flexmoe.errors import FlexmoeError
from flexmoe.headers import EXPORT_NAME
from helpers import random_plan
from zoo import tiny_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base checkpoint, a plan for it and a ragged export."""
    root = tmp_path_factory.mktemp("speed")
    model = tiny_model("olmoe")
    model.save_pretrained(root / "base")
    random_plan(model, root / "base").save(root / "plan")
    flexmoe.export(root / "plan", root / "ragged", pruned=0.4, layout="ragged")
    return root


def bench(*words, out=None):
    command = ["bench", "model", *map(str, words), "--prompt", "5", "--new", "2", "--repeats", "1"]
    command += ["--device", "cpu", *(["--json", str(out)] if out else [])]
    result = CliRunner().invoke(app, command)
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return json.loads(out.read_text()) if out else result.output


def test_a_family_at_every_budget(made, tmp_path):
    found = bench(made / "plan", "--batch", "1,3", "--pruned", "0,0.4", out=tmp_path / "a.json")
    rows = {(row["engine"], row["pruned"], row["batch"]): row for row in found["rows"]}
    stock = [("transformers eager", 0.0), ("transformers grouped_mm", 0.0)]
    assert set(rows) == {
        (*e, b) for e in [*stock, ("flexmoe", 0.0), ("flexmoe", 0.4)] for b in (1, 3)
    }
    for row in found["rows"]:
        assert row["ttft_s"] > 0 and row["tpot_s"] > 0
        assert row["prefill_tokens_per_s"] == pytest.approx(5 * row["batch"] / row["ttft_s"])
        assert row["decode_tokens_per_s"] == pytest.approx(row["batch"] / row["tpot_s"])
    plan = flexmoe.Plan.load(made / "plan")
    saved = plan.member(0.0).routed_parameters - plan.member(0.4).routed_parameters
    whole, small = (rows["flexmoe", share, 1]["weights"] for share in (0.0, 0.4))
    assert whole - small == 4 * saved
    assert {"date", "hardware", "versions", "dtype", "clock"} <= set(found)


def test_an_export_beside_its_base(made, tmp_path):
    found = bench(
        made / "ragged", "--batch", "1", "--against", made / "base", out=tmp_path / "new" / "b"
    )
    engines = [(row["engine"], row["pruned"]) for row in found["rows"]]
    assert engines[0] == ("transformers eager", 0.0)
    assert engines[-1][0] == "flexmoe, ragged export" and engines[-1][1] == pytest.approx(0.4)
    assert found["rows"][-1]["weights"] < found["rows"][0]["weights"]
    assert "grouped_mm" in bench(made / "base", "--batch", "1")


def test_a_stock_export_is_told_from_its_base(made, tmp_path):
    flexmoe.export(made / "plan", tmp_path / "uniform", pruned=0.4, layout="uniform")
    found = bench(
        tmp_path / "uniform", "--batch", "1", "--against", made / "base", out=tmp_path / "c"
    )
    achieved = json.loads((tmp_path / "uniform" / EXPORT_NAME).read_text())["achieved"]
    assert [(row["engine"], row["pruned"]) for row in found["rows"]] == [
        ("transformers eager", 0.0),
        ("transformers grouped_mm", 0.0),
        ("transformers eager, export", achieved),
        ("transformers grouped_mm, export", achieved),
    ]


@pytest.mark.parametrize("against", ["nowhere/nothing", "dense"])
def test_what_it_cannot_be_compared_with_is_refused_before_a_model_loads(
    made, against, monkeypatch
):
    monkeypatch.chdir(made)
    settings = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    dense = LlamaConfig(**settings, num_attention_heads=1)
    LlamaForCausalLM(dense).save_pretrained("dense")
    monkeypatch.setattr(speed, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(FlexmoeError, match=r"nothing|experts"):
        bench("ragged", "--against", against)


def test_more_tokens_than_positions_are_refused_before_a_model_loads(made, monkeypatch):
    monkeypatch.setattr(speed, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(FlexmoeError, match=r"--prompt 1000000 and --new 16 are more than"):
        speed.measure(str(made / "base"), speed.SpeedConfig(prompt=10**6))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan", "--batch", "0"], "--batch '0': expected whole numbers from 1"),
        (["plan", "--dtype", "float8"], "unknown dtype 'float8'"),
        (["plan", "--pruned", "0.99"], "0.99"),
        (["plan", "--against", "base"], "compared with itself"),
        (["base", "--pruned", "0.4"], "only a family has budgets"),
        (["plan", "--json", "base"], "cannot write 'base': it is a folder"),
    ],
)
def test_bad_input_is_refused(made, words, message, monkeypatch):
    monkeypatch.chdir(made)
    with pytest.raises(FlexmoeError, match=message):
        bench(*words)


@pytest.mark.parametrize("where", ["cuda:0", "cuda:1"])
def test_the_clock_waits_for_the_gpu_of_the_model(where, monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    clock, about = speed._clock(SimpleNamespace(device=torch.device(where)))
    clock()
    assert waited == [torch.device(where)] and "GPU" in about
