"""Doctor's first answer, without torch: it says what transformers' own classes say."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from flexmoe.cli import app
from flexmoe.config import CompressConfig
from flexmoe.doctor.diagnosis import examine
from flexmoe.doctor.estimates import Estimator
from flexmoe.doctor.found import Diagnosis, Need
from flexmoe.doctor.glance import TABLE, glance
from flexmoe.doctor.machine import Rates
from flexmoe.doctor.pace import pace
from flexmoe.headers import resolve
from flexmoe.recover_config import MODES, RecoverConfig
from test_doctor import saved
from zoo import DECODERS, model_class, tiny_config

KNOWN = json.loads(TABLE.read_text())["architectures"]
REFUSED = {"ernie4_5_vl_moe"}  # two groups of routed experts in a layer


def test_every_architecture_that_works_is_known() -> None:
    assert set(KNOWN) == set(DECODERS) - REFUSED


class Described(Exception):
    """Stops `examine` before it counts what jobs need."""


def described(source: Path) -> Diagnosis:
    """What `examine` says that a checkpoint is."""

    def stop(found: Diagnosis) -> None:
        raise Described(found)

    with pytest.raises(Described) as told:
        examine(source, described=stop)
    return told.value.args[0]


@pytest.mark.parametrize("model_type", sorted(KNOWN))
def test_it_agrees_with_the_class_of_transformers(model_type: str, tmp_path: Path) -> None:
    source = saved(model_type, tmp_path)
    first = glance(source)
    assert first.problems == [] and first.layers
    assert first.same_as(described(source))


# Values that real checkpoints have and tiny ones do not, one architecture each.
OTHERS: dict[str, dict[str, Any]] = {
    "deepseek_v3": dict(first_k_dense_replace=1, q_lora_rank=None, n_shared_experts=2),
    "qwen3_moe": dict(mlp_only_layers=[1], attention_bias=True, tie_word_embeddings=True),
    "qwen2_moe": dict(decoder_sparse_step=2, hidden_act="gelu_pytorch_tanh"),
    "olmoe": dict(num_experts_per_tok=1, tie_word_embeddings=True),
    "glm4_moe": dict(use_qk_norm=True, first_k_dense_replace=1),
}


@pytest.mark.parametrize("model_type", OTHERS)
def test_it_agrees_for_other_settings(model_type: str, tmp_path: Path) -> None:
    config = tiny_config(model_type)
    for name, value in {**OTHERS[model_type], "vocab_size": 4096}.items():
        setattr(config, name, value)
    model_class(model_type)(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("tiny") / name, tmp_path / name)
    first = glance(tmp_path)
    assert first.problems == [] and first.layers
    assert first.same_as(described(tmp_path))


def test_what_it_does_not_know_it_leaves_to_transformers(tmp_path: Path) -> None:
    source = saved("olmoe", tmp_path)
    text = (source / "config.json").read_text()
    for change in (
        ("OlmoeForCausalLM", "Other"),
        ('"olmoe"', '"other"'),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 1'),
        ('"num_experts_per_tok": 2', '"num_experts_per_tok": 20'),
    ):
        assert change[0] in text
        (source / "config.json").write_text(text.replace(*change))
        assert glance(source).layers == [] and glance(source).problems == []
    (source / "config.json").write_text(text)
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes().replace(b"self_attn.q_proj", b"self_attn.z_proj", 1))
    assert glance(source).layers == []
    shard.write_bytes(shard.read_bytes()[:-1])
    (problem,) = glance(source).problems
    assert "cut short" in problem


@pytest.mark.parametrize(
    "change",
    [
        ("config.json", b'"num_hidden_layers": 2', b'"num_hidden_layers": "2"'),
        ("config.json", b'"hidden_act": "silu"', b'"hidden_act": ["silu"]'),
        ("model.safetensors", b'"dtype":"F32"', b'"dtype":"F30"'),
    ],
)
def test_nonsense_is_left_to_transformers(change: tuple[str, bytes, bytes], tmp_path: Path) -> None:
    source = saved("olmoe", tmp_path)
    name, before, after = change
    content = (source / name).read_bytes()
    assert before in content
    (source / name).write_bytes(content.replace(before, after))
    first = glance(source)
    assert first.model_type == "olmoe" and first.layers == []


@pytest.mark.parametrize(
    "model_type", ["tiny", "deepseek_v3", "gpt_oss", "nemotron_h", "mixtral", "qwen2_moe"]
)
def test_what_jobs_take_at_least(model_type: str, tmp_path: Path) -> None:
    """As the dry run says, but for activations."""
    source = resolve("tiny") if model_type == "tiny" else saved(model_type, tmp_path)
    first, whole = glance(source, "cpu"), examine(source, CompressConfig(device="cpu"))
    assert first.same_as(whole) and first.device == whole.device == "cpu"
    assert [need.job for need in first.needs] == [need.job for need in whole.needs]
    for least, need in zip(first.needs, whole.needs, strict=True):
        assert least.disk == need.disk and least.scratch == pytest.approx(need.scratch, rel=0.05)
        assert least.seconds
        if "activations" not in need.parts:  # the same, but for biases of routers
            assert least.memory == pytest.approx(need.memory, rel=0.01)
            continue
        known = without(need)
        if "reading them" in least.parts:  # more than what the work itself takes
            assert known <= least.memory <= need.memory
        else:
            assert least.memory == pytest.approx(known, rel=0.01)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU is seen without torch; its speed is not known, and weights stay as they are stored."""
    gpu, cpu = glance("tiny", "cuda"), glance("tiny", "cpu")
    assert gpu.needs[0].seconds is None and gpu.needs[0].memory < cpu.needs[0].memory
    assert glance("tiny", "cuda:1").device == "cuda:1"
    assert glance("tiny", "teapot").needs == [] == glance("tiny").needs
    monkeypatch.setattr("flexmoe.doctor.least._has_gpu", lambda: True)
    assert glance("tiny", "auto").device == "cuda"


def without(need: Need) -> int:
    return need.memory - need.parts["activations"]


def test_arithmetic_is_counted_the_same_in_all_models(tmp_path: Path) -> None:
    """Operations for every active parameter, counted on Qwen3-30B-A3B, hold for another one."""
    config = tiny_config("mixtral")
    sizes = dict(hidden_size=1024, intermediate_size=512, max_position_embeddings=16384)
    for name, value in {**sizes, "num_hidden_layers": 12, "vocab_size": 4096}.items():
        setattr(config, name, value)
    model_class("mixtral")(config).save_pretrained(tmp_path)
    estimator = Estimator.open(tmp_path, "cpu")
    active = glance(tmp_path).parameters["active"]
    estimator._rates[torch.float32] = Rates(active, float("inf"))
    work = json.loads(TABLE.read_text())["work"]
    needs = [estimator.compress(CompressConfig(data="tiny"))]
    needs += [estimator.recover(RecoverConfig(mode=mode), 2**40) for mode in MODES]
    for need in needs:
        assert need.seconds == pytest.approx(work[need.job], rel=0.3), need.job


def test_the_processors_rate_where_its_cores_are_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product whose threads wait for each other, and a copy that is interrupted at first."""
    product, copy, copies = np.matmul, np.copyto, [0]

    def waits(a: Any, b: Any, out: Any) -> None:
        if a.shape[0] * a.shape[1] * b.shape[1] > 64**3:
            time.sleep(0.03)
        product(a, b, out=out)

    def interrupted(target: Any, source: Any) -> None:
        copies[0] += 1
        time.sleep(0.2 if copies[0] < 4 else 0.0)
        copy(target, source)

    monkeypatch.setattr("flexmoe.doctor.pace.np.matmul", waits)
    monkeypatch.setattr("flexmoe.doctor.pace.np.copyto", interrupted)
    operations, moved = pace(64, 128)
    assert operations > 10 * 2 * 256 * 64 * 128 / 0.03
    assert moved > 2**25 / 0.2


def test_nothing_heavy_is_imported_for_it() -> None:
    code = """
import sys
import flexmoe.cli
from flexmoe.doctor.glance import glance
from flexmoe.reports.report import size
assert glance("tiny").layers
assert not {"torch", "transformers", "numpy", "pandas"} & set(sys.modules)
assert glance("tiny", "cpu").needs
assert not {"torch", "transformers", "pandas"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_its_description_comes_first_and_only_once() -> None:
    done = CliRunner().invoke(app, ["doctor", "tiny"])
    assert done.exit_code == 0, done.output
    assert done.output.count("MoE layers") == 1
    assert done.output.index("MoE layers") < done.output.index("loading transformers")
    assert done.output.index("needed at least") < done.output.index("loading transformers")
    assert done.output.index("loading transformers") < done.output.index("estimates on")


def test_quick_says_it_without_transformers(tmp_path: Path) -> None:
    code = """
import sys
from typer.testing import CliRunner
from flexmoe.cli import app
print(CliRunner().invoke(app, ["doctor", "tiny", "--quick", "--json"]).stdout)
assert CliRunner().invoke(app, ["doctor", "tiny", "--quick"]).exit_code == 0
assert not {"torch", "transformers"} & set(sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    said = json.loads(run.stdout)
    assert said["needs"][0]["job"] == "compress" and said["parameters"]["active"] > 0
    text = CliRunner().invoke(app, ["doctor", "tiny", "--quick"]).output
    assert "needed at least" in text and "loading transformers" not in text
    source = saved("olmoe", tmp_path)
    config = (source / "config.json").read_text()
    (source / "config.json").write_text(config.replace('"olmoe"', '"other"'))
    for more in ([], ["--json"]):
        unknown = CliRunner().invoke(app, ["doctor", str(source), "--quick", *more])
        assert unknown.exit_code != 0 and "leave out --quick" in str(unknown.exception)
    ragged = json.loads(config) | {"quantization_config": {"quant_method": "flexmoe"}}
    (source / "config.json").write_text(json.dumps(ragged))
    said = CliRunner().invoke(app, ["doctor", str(source), "--quick"])
    assert said.exit_code == 2 and "ragged export: start from its family" in said.output
    (source / "config.json").write_text("{")
    assert CliRunner().invoke(app, ["doctor", str(source), "--quick"]).exit_code == 2
