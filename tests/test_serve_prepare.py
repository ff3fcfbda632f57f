"""What ``flexmoe serve`` refuses before it loads anything, and what it says."""

import re
import shutil
import socket

import pytest
from typer.testing import CliRunner

import flexmoe
from flexmoe.cli import app
from flexmoe.data import TINY
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.curve import save_curve
from flexmoe.evaluation.records import OfWeights
from flexmoe.family import load_stock
from flexmoe.plan import read_manifest
from flexmoe.serve import prepare
from flexmoe.serve.engine import Slo
from flexmoe.serve.prepare import make_settings, pick_engine
from golden_data import GOLDEN
from helpers import made_curve, random_plan

OTHERS = {
    "host": "127.0.0.1",
    "port": 18377,
    "api_key": None,
    "kv_tokens": None,
    "base": None,
    "device": "auto",
    "dtype": "auto",
}


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """A plan with budgets 0, 20, 40 and 60."""
    folder = tmp_path_factory.mktemp("serve") / "qwen"
    source = TINY / "model"
    random_plan(load_stock(source, device="cpu"), source).save(folder)
    return folder


def made(family, **changes):
    return make_settings(str(family), **OTHERS | changes)


def test_the_defaults(family):
    found = made(family)
    assert found.name == "qwen" and found.default == "0" and found.slo is None
    assert found.budgets.labels == ("0", "20", "40", "60") and found.host == "127.0.0.1"
    assert found.max_body == 8_000_000
    sizes = [member.bytes for member in found.members]
    assert sizes == sorted(sizes, reverse=True)


def test_what_is_chosen(family):
    found = made(family, budgets="40, 0", default="40", name="org/moe", policy="slo", ttft_ms=300.0)
    assert found.budgets.ids == ("org/moe", "org/moe:0", "org/moe:40") and found.default == "40"
    assert found.slo == Slo(ttft_ms=300, tpot_ms=50, richest="0", poorest="40")


def test_quality_is_that_of_the_saved_curve(family, tmp_path):
    folder = tmp_path / "measured"
    shutil.copytree(family, folder)
    plan = prepare.Plan.load(folder)
    of = OfWeights(plan_sha256=read_manifest(folder).tensors_sha256, weights_sha256="0" * 64)
    curve = made_curve(plan, of)
    save_curve(folder, curve)
    found = made(folder, budgets="0,40").members
    assert [m.nll for m in found] == [curve.budgets[0].nll, curve.budgets[2].nll]
    other = made_curve(plan, of.model_copy(update={"plan_sha256": "1" * 64}))
    save_curve(folder, other)
    assert [m.kept for m in made(folder, budgets="0,40").members] == [None, None]


def test_a_checkpoint_is_one_member():
    found = make_settings("tiny", **OTHERS)
    assert found.budgets.ids == ("tiny",) and found.members[0].routed_parameters > 10**6


def test_exports_of_stock_widths_say_what_they_keep(family, tmp_path):
    for layout in ("ragged", "masked"):
        done = flexmoe.export(family, tmp_path / layout, pruned=0.4, layout=layout)
        (member,) = prepare.served_members(str(tmp_path / layout), None)
        assert member.routed_parameters == done.routed_parameters < 0.7 * 1_572_864


def test_a_wrong_kernel_is_refused(family, monkeypatch):
    monkeypatch.setattr("flexmoe.kernels.interface.FORCED", "tourch")
    monkeypatch.setenv("FLEXMOE_KERNEL", "tourch")
    with pytest.raises(FlexmoeError, match=r"'tourch'. Did you mean 'torch'"):
        made(family)
    run = CliRunner().invoke(app, ["compress", "tiny", "-o", "never"])
    assert isinstance(run.exception, FlexmoeError) and "FLEXMOE_KERNEL" in str(run.exception)


WRONG = [
    ({"budgets": "0,39"}, r"unknown budget '39' .* Did you mean '40'\? Known: 0, 20, 40, 60"),
    ({"budgets": "0.4"}, r"Did you mean '40'"),
    ({"budgets": ""}, "unknown budget ''"),
    ({"default": "60", "budgets": "0,20"}, "unknown budget '60' .* Known: 0, 20"),
    ({"ttft_ms": 500.0}, "--ttft-ms has no effect without --policy slo"),
    ({"poorest": "40"}, "--poorest has no effect without --policy slo"),
    ({"policy": "sla"}, "unknown policy 'sla'. Did you mean 'slo'"),
    ({"policy": "slo", "poorest": "80"}, "unknown budget '80'"),
    ({"policy": "slo", "richest": "40", "poorest": "40"}, "nowhere to go"),
    ({"policy": "slo", "budgets": "20"}, "nowhere to go"),
    ({"policy": "slo", "tpot_ms": 0.0}, "--tpot-ms 0: expected milliseconds above 0"),
    ({"policy": "slo", "richest": "60", "poorest": "0"}, "--richest 60 must prune less"),
    ({"policy": "slo", "richest": "30"}, "unknown budget '30' .* Known: 0, 20, 40, 60"),
    ({"policy": "slo", "ttft_ms": float("nan")}, "--ttft-ms nan: expected milliseconds"),
    ({"name": "two words"}, "model name 'two words'"),
    ({"name": "a:b"}, r"model name 'a:b': .* colons \(a budget follows one\)"),
    ({"max_body_mb": 0.0}, "--max-body-mb 0"),
    ({"max_body_mb": 1e-7}, "--max-body-mb 1e-07: expected a number above 0"),
    ({"kv_tokens": 0}, "--kv-tokens 0"),
    ({"api_key": ""}, "--api-key is empty"),
    ({"api_key": "s\u00e9cret"}, "--api-key has signs that no header can carry"),
    ({"base": "/no/such/folder"}, "no folder '/no/such/folder'"),
    ({"base": str(GOLDEN / "models" / "olmoe")}, "the plan is of another model"),
    ({"name": ""}, "--name is empty"),
    ({"dtype": "fp32"}, "unknown dtype 'fp32'"),
    ({"port": 0}, "--port 0: expected"),
    ({"host": "no.such.host.invalid"}, "cannot listen on no.such.host.invalid"),
]


@pytest.mark.parametrize(("changes", "message"), WRONG)
def test_wrong_wishes_are_refused(family, changes, message):
    with pytest.raises(FlexmoeError, match=message):
        made(family, **changes)


def test_budgets_and_a_base_have_no_effect_on_a_single_member():
    with pytest.raises(FlexmoeError, match="--budgets has no effect: 'tiny' is one member"):
        make_settings("tiny", budgets="0", **OTHERS)
    with pytest.raises(FlexmoeError, match="base is given, but 'tiny' is no plan"):
        make_settings("tiny", **OTHERS | {"base": "tiny"})


def test_a_port_in_use_is_refused(family):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(FlexmoeError, match=f"cannot listen on 127.0.0.1 port {port}: .*in use"):
            made(family, port=port)


def test_engines(monkeypatch):
    there = {"fastapi", "uvicorn", "openai", "prometheus_client"}
    monkeypatch.setattr(
        prepare.importlib.util, "find_spec", lambda name: name if name in there else None
    )
    assert pick_engine("auto") == pick_engine("transformers") == "transformers"
    with pytest.raises(FlexmoeError, match=re.escape("pip install 'flexmoe[vllm]'")):
        pick_engine("vllm")
    with pytest.raises(FlexmoeError, match="Did you mean 'vllm'"):
        pick_engine("vlm")
    there.add("vllm")
    assert pick_engine("auto") == "vllm"
    there.clear()
    with pytest.raises(FlexmoeError, match=re.escape("pip install 'flexmoe[serve]'")):
        pick_engine("auto")


@pytest.mark.parametrize(
    ("engine", "options", "message"),
    [
        ("transformers", "-- --tensor-parallel-size 2", "options after -- are for --engine vllm"),
        ("transformers", "--budgets 7", "Did you mean '0'"),
        ("transformers", "--device cud", "no device 'cud': expected auto, cpu"),
        ("transformers", "--device cuda:99", "but this machine has"),
        ("transformers", "--device meta", "device 'meta' holds no values"),
        ("transformers", "--device spread", "device 'spread' is for flexmoe eval"),
        ("vllm", "--device cpu", "vLLM chooses its device itself"),
        ("vllm", "--kv-tokens 64", "--kv-tokens is for --engine transformers"),
        ("vllm", "--budgets 7", "Did you mean '0'"),
        ("vllm", "-- --port 3", "--port is set by flexmoe serve"),
        ("vllm", "--base /no/such/folder", "no folder '/no/such/folder'"),
    ],
)
def test_the_command_refuses_before_it_says_or_starts_anything(
    family, monkeypatch, engine, options, message
):
    monkeypatch.setattr(prepare, "_installed", lambda engine: True)
    monkeypatch.setattr("flexmoe.serve.vllm.compat.check_version", lambda: None)
    command = ["serve", str(family), "--port", "18377", "--engine", engine, *options.split()]
    run = CliRunner().invoke(app, command)
    assert isinstance(run.exception, FlexmoeError) and message in str(run.exception)
    assert not run.output


def test_the_command_says_what_it_will_use(family, monkeypatch):
    launched = []
    monkeypatch.setattr(
        "flexmoe.serve.transformers_engine.launch", lambda settings, say: launched.append(settings)
    )
    command = ["serve", str(family), "--engine", "transformers", "--port", "18377"]
    run = CliRunner().invoke(app, [*command, "--host", "0.0.0.0", "--policy", "slo"])
    assert run.exit_code == 0, run.output
    for words in ("qwen:40", "1.57 M", "memory ", "TTFT 500 ms", "/flexmoe/ui", "give --api-key"):
        assert words in run.output
    assert "curl http://0.0.0.0:18377/v1/completions -H" in run.output
    assert launched[0].slo.poorest == "60"


def test_constants_are_not_for_vllm(tmp_path):
    from flexmoe.serve.prepare import check_vllm

    about = tmp_path / "flexmoe_export.json"
    (tmp_path / "config.json").write_text("{}")
    for router in ("keep", "constant"):
        about.write_text(f'{{"router": "{router}"}}')
        if router == "keep":
            check_vllm(str(tmp_path))
    with pytest.raises(FlexmoeError, match="use --engine transformers"):
        check_vllm(str(tmp_path))
