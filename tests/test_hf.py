"""A ragged export in transformers: loads under the stock class, saves what was loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import flexmoe.hf  # noqa: F401  (what import flexmoe does when transformers is there)
from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.errors import FlexmoeError
from flexmoe.exporter import export, rank_checkpoint
from flexmoe.trace import trace
from helpers import (
    LOGIT_TOLERANCE,
    difference,
    ids_of,
    load,
    logits,
    masked_logits,
    random_plan,
    same_model,
    tensors,
)
from zoo import tiny_model

# per-expert hub names (two spellings), one tensor for all with biases, without gate, renamed
BF16_TOLERANCE = 2**-5  # a few roundings by 2**-8 in two layers
FAMILIES = ("olmoe", "mixtral", "gpt_oss", "nemotron_h", "hy_v4", "inkling2_text")
IMPORTS = {
    "flexmoe first": "register(); register(); from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM, PreTrainedModel; "
    "register(); register()",
}


def ragged(model_type: str, root: Path, pruned: float = 0.4) -> Path:
    model, source = tiny_model(model_type), root / "source"
    model.save_pretrained(source, max_shard_size="50KB")
    random_plan(model, source).save(root / "plan")
    export(root / "plan", root / "ragged", pruned=pruned, layout="ragged")
    return root / "ragged"


@pytest.mark.parametrize("name", FAMILIES)
def test_loads_under_the_stock_class_and_saves_the_same(name: str, tmp_path: Path) -> None:
    out, stock = ragged(name, tmp_path), tiny_model(name)
    model, info = AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, output_loading_info=True
    )
    assert type(model) is type(stock)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert all(not p.is_meta for p in model.parameters())
    plan, ids = random_plan(stock, tmp_path / "source"), ids_of(stock)
    want = masked_logits(stock, plan, 0.4, ids)
    assert difference(logits(model.eval(), ids), want) < LOGIT_TOLERANCE

    model.save_pretrained(tmp_path / "again")
    before, after = tensors(out), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((p / "config.json").read_text()) for p in (out, tmp_path / "again")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32).eval()
    assert same_model(again, model)
    assert difference(logits(again, ids), logits(model, ids)) < LOGIT_TOLERANCE


@pytest.mark.parametrize("name", ["gpt_oss", "granitemoe", "hy_v4", "aria_text", "olmoe"])
def test_without_flexmoe_it_is_refused(name: str, tmp_path: Path) -> None:
    """transformers skips a quantization_config that it does not know: the weights must stop it."""
    program = (
        "import sys; from transformers import AutoModelForCausalLM as Auto\n"
        f"try: Auto.from_pretrained({str(ragged(name, tmp_path))!r})\n"
        "except RuntimeError as error: print('refused:', error)\n"
        "assert 'flexmoe' not in sys.modules\n"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout.startswith("refused:")
    empty = {key for key, tensor in tensors(tmp_path / "ragged").items() if tensor.shape == (0,)}
    source = set(Checkpoint(tmp_path / "source").tensors)
    assert len(empty & source) == (0 if name == "olmoe" else 6 if name == "gpt_oss" else 4)


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_bfloat16(name: str, tmp_path: Path) -> None:
    model, source = tiny_model(name).bfloat16(), tmp_path / "source"
    model.save_pretrained(source, max_shard_size="50KB")
    plan, ids = random_plan(model, source), ids_of(model)
    (family := tmp_path / "family").mkdir()
    rank_checkpoint(source, plan, family)
    plan.save(family, ranked=True)
    layers, ranked = [trace(Checkpoint(p), meta_model(p)) for p in (source, family)]
    report = export(family, tmp_path / "ragged", pruned=0.4, layout="ragged")
    assert report.bytes == plan.member(0.4).bytes
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "ragged").eval()
    assert loaded.dtype == torch.bfloat16
    for i, width in plan.widths(0.4).items():
        module = loaded.model.layers[i].mlp.experts
        downs = module.down_proj.split(width.tolist())
        for e, w in enumerate(width.tolist()):
            before = layers[i].expert(Checkpoint(source), e)
            after = ranked[i].expert(Checkpoint(family), e)
            best = plan.order[i][e].long()
            for side in before:
                moved = before[side] if side == "down_bias" else before[side][best]
                assert torch.equal(after[side], moved)
            assert torch.equal(downs[e], after["down"][:w])
    loaded.save_pretrained(tmp_path / "again", max_shard_size="50KB")
    kept, again = tensors(tmp_path / "ragged"), tensors(tmp_path / "again")
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[k], again[k]) and kept[k].dtype == again[k].dtype for k in kept)
    stock = AutoModelForCausalLM.from_pretrained(source).eval()
    want = masked_logits(stock, plan, 0.4, ids)
    assert difference(logits(loaded, ids).float(), want.float()) < BF16_TOLERANCE
    want = masked_logits(load(source, model), plan, 0.4, ids)  # the same weights, in float32
    assert difference(logits(load(tmp_path / "ragged", model), ids), want) < LOGIT_TOLERANCE


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss"])
def test_ragged_export_is_no_model_to_compress(name: str, tmp_path: Path) -> None:
    out = ragged(name, tmp_path)
    with pytest.raises(FlexmoeError, match="is a ragged export: start from its family"):
        trace(Checkpoint(out), meta_model(out))


def test_storage_is_ragged_and_keeps_its_dtype(tmp_path: Path) -> None:
    out = ragged("gpt_oss", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    module, widths = model.model.layers[0].mlp.experts, model.config.quantization_config.widths["0"]
    assert module.flexmoe_width_E == widths
    assert module.flexmoe_offset_E == [sum(widths[:e]) for e in range(len(widths) + 1)]
    S = sum(widths)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "gate_up_proj": (S, 2, 32),
        "gate_up_proj_bias": (S, 2),
        "down_proj": (S, 32),
        "down_proj_bias": (8, 32),
    }
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    assert model.config._experts_implementation == "flexmoe"


def test_a_loaded_export_learns(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(ragged("olmoe", tmp_path), dtype=torch.float32)
    ids = ids_of(model)
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.layers[1].mlp.experts.gate_up_proj.grad.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(format=3), "format 3, this flexmoe reads format 1 and 2"),
        (dict(widths=None), "'widths' must map"),
        (dict(widths={"0": [1, -2]}), "'widths' must map"),
        (dict(colour="red"), "colour"),
        (dict(widths={"0": [16] * 8}), "widths for the layers"),
        (dict(widths={"0": [16] * 7, "1": [16] * 8}), "7 widths"),
        (dict(widths={"0": [17] * 8, "1": [16] * 8}), "up to 17"),
    ],
)
def test_damaged_tables_are_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    out = ragged("olmoe", tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"] |= change
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlexmoeError, match=message):
        AutoModelForCausalLM.from_pretrained(out)


def test_table_of_another_export_is_refused(tmp_path: Path) -> None:
    out = ragged("olmoe", tmp_path)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["widths"]["0"].reverse()  # the same total
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError):  # transformers collects conversion errors in a report
        AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize("order", IMPORTS)
def test_loads_in_every_import_order(order: str, tmp_path: Path) -> None:
    program = (
        "import sys; from flexmoe._lazy import register_when_transformers_loads as register\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()\n"
        f"{IMPORTS[order]}\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(ragged('olmoe', tmp_path))!r})\n"
        "assert model.model.layers[0].mlp.experts.flexmoe_width_E\n"
        "assert not any(type(f).__module__ == 'flexmoe._lazy' for f in sys.meta_path)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
