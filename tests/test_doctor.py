"""Doctor: what it reads from shapes, what it refuses, and that dry runs count what really lives."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from typer.testing import CliRunner

from flexmoe.actions import ActionConfig
from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.cli import app
from flexmoe.doctor import dryrun
from flexmoe.doctor.diagnosis import before_compress, examine
from flexmoe.doctor.dryrun import DryRun
from flexmoe.doctor.estimates import Estimator
from flexmoe.doctor.meter import Meter
from flexmoe.doctor.sizes import TRACED
from flexmoe.experts import expert_layers
from flexmoe.exporter import export
from flexmoe.family import load_stock
from flexmoe.headers import resolve
from flexmoe.methods import find_method
from flexmoe.methods.diep import loss_of
from flexmoe.observe import observe
from flexmoe.pipeline import CompressConfig, compress
from flexmoe.rco import RcoConfig, learn_order
from flexmoe.recover import trained_parameters
from flexmoe.recover_config import RecoverConfig
from flexmoe.statistics import find_statistics
from flexmoe.trace import CODED_HIDDEN, trace
from zoo import tiny_model

FISHER = find_statistics(("fisher_EI",))


def saved(model_type: str, folder: Path) -> Path:
    """A tiny model on disk, with the tokenizer of the shipped one."""
    tiny_model(model_type, vocab_size=4096).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("tiny") / name, folder / name)
    return folder


def test_what_tiny_is() -> None:
    found = examine("tiny")
    assert found.problems == [] and found.warnings == []
    assert (found.model_type, found.dtype) == ("qwen2_moe", "bfloat16")
    assert [layer.index for layer in found.layers] == [0, 1, 2, 3]
    layer = found.layers[0]
    assert (layer.experts, layer.channels, layer.hidden) == (16, 64, 128)
    assert layer.flags == ("has_gate", "is_concatenated")
    # three matrices of 128 by 128, and the row that weighs them
    assert layer.shared_parameters == 3 * 128 * 128 + 128
    model = load_stock("tiny")
    total = sum(p.numel() for p in model.parameters())
    assert found.parameters["total"] == total and found.experts_per_token == 4
    assert found.parameters["active"] == total - 1_572_864 * 3 // 4
    assert found.exports == {"uniform": "", "ragged": "", "masked": ""}
    full = found.widths[0]
    assert (full.width, full.tensor_parallel, full.fp8_blocks, full.k_quants) == (
        64, (2, 4, 8), False, False,
    )  # fmt: skip


def test_coupled_width_is_said_and_the_other_layouts_work(tmp_path: Path) -> None:
    found = examine(saved("deepseek_v3", tmp_path))
    assert (
        "'moe_intermediate_size' sets the width of the routed experts and also of"
        in (found.exports["uniform"])
    )
    assert "shared_experts" in found.exports["uniform"]
    assert found.exports["ragged"] == found.exports["masked"] == ""
    assert found.layers[0].shared_parameters > 0
    assert [need.job for need in found.needs if "uniform" in need.job] == []


def test_sizes_of_exports_are_exact(tmp_path: Path) -> None:
    source = saved("gpt_oss", tmp_path / "source")
    compress(source, tmp_path / "family", CompressConfig(method="magnitude", allocate="global"))
    needs = {need.job: need for need in examine(tmp_path / "family").needs}
    for layout in ("uniform", "ragged", "masked"):
        done = export(tmp_path / "family", tmp_path / layout, pruned=0.4, layout=layout)
        assert needs[f"export --layout {layout}"].disk == done.bytes
    assert needs["recover --mode full"].disk == Checkpoint(tmp_path / "family").bytes


def test_json_has_everything_and_the_exit_code_tells(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["doctor", "tiny", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found["layers"]) == 4 and found["problems"] == []
    jobs = {need["job"] for need in found["needs"]}
    assert {"compress", "recover --mode full", "export --layout ragged"} <= jobs
    assert all(need["memory"] > 0 and need["seconds"] > 0 for need in found["needs"])
    source = saved("olmoe", tmp_path / "model")
    (source / "tokenizer.json").unlink()
    shard = source / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    done = CliRunner().invoke(app, ["doctor", str(source)])
    assert done.exit_code == 2
    assert "cut short" in done.output and "tokenizer" in done.output  # not only the first


def test_compress_refuses_what_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompressConfig(allocate="global", samples=2, seq_len=16)
    assert before_compress("tiny", tmp_path / "out", config) == []
    weights = 4 * sum(p.numel() for p in meta_model(resolve("tiny")).parameters())
    for free, expected in ((weights + 1000, "warned"), (weights - 1000, "refused")):
        monkeypatch.setattr("flexmoe.doctor.diagnosis.free_memory", lambda device, free=free: free)
        if expected == "warned":
            (line,) = before_compress("tiny", tmp_path / "out", config)
            assert "compress takes about" in line and "--batch-size" in line
        else:
            with pytest.raises(ValueError, match="the weights alone take"):
                before_compress("tiny", tmp_path / "out", config)


# --- Dry runs ----------------------------------------------------------------------------------


def test_the_meter_counts_what_lives() -> None:
    with torch.no_grad():
        a = torch.ones(100, 100)
        meter = Meter([a], heap=False)
        with meter:
            b = a @ a
            assert meter.live == 40_000 and meter.operations == 2 * 100**3
            c = b[:50]  # a view is no memory
            d = torch.cat([b, c])
            assert meter.live == 40_000 + 60_000
            del b, c, d
            assert meter.live == 0 and meter.peak == 100_000 and meter.moved == 100_000


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers, the third and fifth of another kind."""
    folder = tmp_path_factory.mktemp("deep")
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=96, moe_intermediate_size=32,
        num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        num_experts=8, num_experts_per_tok=2, mlp_only_layers=[2, 4],
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("job", ["observe", "learn", "distil", "recomputed"])
def test_layers_left_out_are_counted(job: str, deep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two layers of a kind stand for all of them: the same cost as running every one."""
    costs = []
    for alike in (2, 99):
        monkeypatch.setattr(dryrun, "ALIKE", alike)
        dry = DryRun(meta_model(deep), torch.float32)
        assert sorted(kind.number for kind in dry.kinds.values()) == [2, 4]
        if job == "observe":
            costs.append(dry.observe(4, 64, FISHER))
        elif job == "learn":
            costs.append(dry.learn(2, 64, 2, False))
        else:
            trained = list(trained_parameters(dry.model, "full").values())
            costs.append(dry.distil(2, [1, 1], 64, trained, job == "recomputed"))
    short, whole = costs
    assert short.peak == pytest.approx(whole.peak, rel=0.1)  # the first of a kind keeps less
    assert short.operations == pytest.approx(whole.operations, rel=0.1)
    # what the loss moves is scaled like the layers, and with so small layers it is most of it
    assert short.moved == pytest.approx(whole.moved, rel=0.25)


@pytest.mark.parametrize("backward", [True, False])
def test_a_dry_run_counts_the_bytes_of_a_real_pass(deep: Path, backward: bool) -> None:
    """The same meter on real tensors: experts get unequal shares there, and padding is none."""
    names = ("fisher_EI",) if backward else ("energy_sum_EI",)
    wanted = find_statistics(names)
    dry = DryRun(meta_model(deep), torch.float32, heap=False).observe(4, 64, wanted)
    model = load_stock(deep, dtype=torch.float32)
    ids = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    gc.collect()
    meter = Meter([*model.parameters(), *model.buffers()], heap=False)
    with meter:
        observe(model, ids, names, batch_size=4)
    assert dry.peak == pytest.approx(meter.peak, rel=0.1)
    assert dry.operations == pytest.approx(meter.operations, rel=0.1)


@pytest.mark.parametrize("job", ["rco", "diep"])
def test_a_dry_run_counts_the_bytes_of_a_real_step_of_learning(deep: Path, job: str) -> None:
    dry = DryRun(meta_model(deep), torch.float32, heap=False)
    expected = dry.learn(4, 64, 1, False) if job == "rco" else dry.scale(4, 64)
    model = load_stock(deep, dtype=torch.float32).requires_grad_(False)
    layers = expert_layers(model)
    ids = torch.randint(0, 4096, (4, 64), generator=torch.Generator().manual_seed(0))
    score = {layer.index: torch.rand(layer.E) for layer in layers}
    gc.collect()
    meter = Meter([*model.parameters(), *model.buffers()], heap=False)
    with meter:
        if job == "rco":
            learn_order(model, ids, score, [0.4], RcoConfig(steps=1, draws=2))
        else:
            ones = {layer.index: torch.ones(layer.E, requires_grad=True) for layer in layers}
            loss_of(model, ids, layers, ones).backward()
    assert expected.peak == pytest.approx(meter.peak, rel=0.15)
    steps = 2 if job == "rco" else 1
    assert expected.operations * steps == pytest.approx(meter.operations, rel=0.15)


def test_learning_is_part_of_the_estimate(deep: Path) -> None:
    """Operations are those of the steps: twice as many for twice the steps."""
    estimator = Estimator.open(deep, "cpu")
    settings = {"samples": 8, "seq_len": 64, "batch_size": 4}

    def operations(**more: Any) -> float:
        config = CompressConfig(**settings, **more)
        return estimator._compress(config, 4, 64, torch.float32).operations

    seen = operations(method="seer", allocate="layer")
    once, twice = (
        operations(method="seer", allocate="rco", learn=RcoConfig(steps=8 * n)) for n in (1, 2)
    )
    assert twice - seen == pytest.approx(2 * (once - seen)) and once > 10 * seen
    assert operations(method="diep") > 20 * seen
    once, twice = (operations(method="taylor", learn=ActionConfig(steps=5 * n)) for n in (1, 2))
    taylor = operations(method="taylor", allocate="global")
    assert twice - taylor == pytest.approx(2 * (once - taylor)) and once > taylor
    channels = estimator.compress(CompressConfig(**settings, method="heapr", allocate="rco"))
    plain = estimator.compress(CompressConfig(**settings, method="heapr"))
    assert channels.parts["statistics"] > plain.parts["statistics"]
    assert channels.seconds is not None and plain.seconds is not None
    assert channels.seconds > plain.seconds


def test_a_sandwich_costs_as_many_members_as_it_has(deep: Path) -> None:
    """A step of cp: a teacher, and four members with gradients; before that the same without."""
    estimator = Estimator.open(deep, "cpu")

    def operations(scheme: str) -> float:
        config = RecoverConfig(scheme=scheme, seq_len=64, batch_size=4)
        return estimator._distil(config, 4, 4, 64, steps=8).operations

    assert 4 < operations("cp") / operations("sp") < 5
    assert operations("family") < 1.5 * operations("sp")


def test_tables_of_what_does_not_fit_are_plain_text(monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("doctor.least", "memory"):
        monkeypatch.setattr(f"flexmoe.{place}.free_ram", lambda: 10**6)
    done = CliRunner().invoke(app, ["doctor", "tiny", "--device", "cpu"])
    assert done.exit_code == 2 and done.output.count("cpu: 1 MB of memory") == 2
    assert "[red]" not in done.output and "needed at least" in done.output
    quick = CliRunner().invoke(app, ["doctor", "tiny", "--device", "cpu", "--quick"])
    assert quick.exit_code == 2
    assert "compress: the weights alone take 10 MB" in " ".join(quick.output.split())
    assert (
        "needed at least" not in CliRunner().invoke(app, ["doctor", "tiny", "--device", "x"]).output
    )


def test_the_trace_takes_what_is_said() -> None:
    """Numbers of 8 bytes, four times, of gate and up with `CODED_HIDDEN` values a channel."""
    assert TRACED == 4 * 8 * CODED_HIDDEN * 2


@pytest.mark.parametrize("model_type", ["deepseek_v3", "gpt_oss", "nemotron_h", "qwen3_next"])
def test_other_architectures_can_be_tried(model_type: str, tmp_path: Path) -> None:
    source = saved(model_type, tmp_path)
    checkpoint, network = Checkpoint(source), meta_model(source)
    estimator = Estimator(checkpoint, trace(checkpoint, network), torch.device("cpu"))
    need = estimator.compress(CompressConfig(samples=2, seq_len=32, batch_size=2))
    assert estimator.top_k == 2 and need.seconds is not None
    assert need.parts.get("weights") == 4 * sum(p.numel() for p in network.parameters())
    assert need.parts["activations"] > 2 * 32 * 4096 * 4  # the logits, at least


def test_methods_are_tried_on_shapes(deep: Path) -> None:
    checkpoint = Checkpoint(deep)
    estimator = Estimator(checkpoint, trace(checkpoint, meta_model(deep)), torch.device("cpu"))
    for name in ("taylor", "fisher", "heapr", "camera", "magnitude", "random"):
        estimator.try_method(find_method(name))
    assert len(expert_layers(estimator.model)) == 4
