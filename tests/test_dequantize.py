"""Quantized checkpoints in bfloat16, against transformers' own reading of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from typer.testing import CliRunner

from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.cli import app
from flexmoe.dequantize import dequantize
from flexmoe.errors import FlexmoeError
from flexmoe.headers import resolve
from flexmoe.trace import trace
from helpers import tensors
from zoo import filled, model_class, tiny_config, tiny_model

BLOCK = 16


def quantized(folder: Path, about: dict[str, Any], weights: dict[str, Tensor]) -> Path:
    """The checkpoint in ``folder`` with other weights and a word about them in config.json."""
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": about}
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: t.contiguous() for name, t in weights.items()}, folder / "model.safetensors")
    return folder


def fp8(folder: Path, **change: Tensor) -> Path:
    """A model whose matrices are in FP8, a factor for each block."""
    tiny_model("qwen3_moe").bfloat16().save_pretrained(folder)
    weights = tensors(folder)
    for name, tensor in tensors(folder).items():
        if "proj" in name:
            rows, columns = tensor.shape
            factors = torch.rand(rows // BLOCK, columns // BLOCK) / 100
            weights |= {name: tensor.mul(100).to(torch.float8_e4m3fn), name + "_scale_inv": factors}
            weights[name.removesuffix("weight") + "activation_scale"] = torch.ones(())
    about = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
    return quantized(folder, about, weights | change)


def mxfp4(folder: Path) -> Path:
    """gpt-oss as it is on the hub: experts of all numbers that four bits and a scale can say."""
    config = tiny_config("gpt_oss")
    config.intermediate_size = 64
    filled(model_class("gpt_oss")(config)).bfloat16().save_pretrained(folder)
    weights = tensors(folder)
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors(folder).items():
        if tensor.ndim == 3:
            E, inputs, outputs = weights.pop(name).shape
            for end, low, high, shape in (
                ("_blocks", 0, 256, (E, outputs, inputs // 32, 16)),
                ("_scales", 118, 126, (E, outputs, inputs // 32)),
            ):
                made = torch.randint(low, high, shape, dtype=torch.uint8, generator=generator)
                weights[name + end] = made
    return quantized(folder, {"quant_method": "mxfp4"}, weights)


@pytest.mark.parametrize(
    "make, config",
    [(fp8, FineGrainedFP8Config(dequantize=True)), (mxfp4, Mxfp4Config(dequantize=True))],
)
def test_weights_are_those_that_transformers_reads(tmp_path: Path, make: Any, config: Any) -> None:
    source, out = make(tmp_path / "quantized"), tmp_path / "plain"
    with pytest.raises(FlexmoeError, match=f"'flexmoe dequantize {source} -o DIR'"):
        meta_model(source)
    result = CliRunner().invoke(app, ["dequantize", str(source), "-o", str(out)])
    assert result.exit_code == 0, result.output
    stock = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=config, dtype=torch.bfloat16
    )
    plain = AutoModelForCausalLM.from_pretrained(out)
    assert plain.dtype is torch.bfloat16
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    want, got = stock.state_dict(), plain.state_dict()
    assert want.keys() == got.keys()
    for name, tensor in want.items():
        assert torch.equal(tensor, got[name]), name
    assert trace(Checkpoint(resolve(out)), meta_model(out))  # what every command begins with


def test_factors_of_every_form_are_products(tmp_path: Path) -> None:
    """Blocks cut short, rows, whole tensors and all experts in one tensor, against loops."""
    name, about = "model.embed_tokens.weight", {"quant_method": "fp8", "weight_block_size": [4, 8]}
    forms: list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, int]]] = [
        ((10, 19), (3, 3), (4, 8)),  # 4.5 blocks of 128 rows are five, as in DeepSeek-V3
        ((10, 19), (10, 1), (1, 19)),
        ((10, 19), (), (10, 19)),
        ((10, 19), (1,), (10, 19)),
        ((3, 10, 16), (3, 5, 2), (2, 8)),
        ((3, 10, 16), (3, 1, 1), (10, 16)),
        ((3, 10, 16), (1,), (10, 16)),
    ]
    for n, (shape, grid, (rows, columns)) in enumerate(forms):
        folder = tmp_path / str(n)
        tiny_model("qwen3_moe").save_pretrained(folder)
        weight = torch.randn(shape).to(torch.float8_e4m3fn)
        kinds = (torch.float32, torch.bfloat16, torch.float8_e8m0fnu)
        factors = torch.rand(grid).to(kinds[n % 3])
        quantized(folder, about, {name: weight, name + "_scale": factors})
        made = tensors(dequantize(folder, tmp_path / f"{n}-plain"))
        assert made.keys() == {name}
        full = factors.float().expand(shape[0], 1, 1) if len(shape) > len(grid) else factors.float()
        for *e, i, j in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
            block = full[(*e, i // rows, j // columns)] if full.numel() > 1 else full.flatten()[0]
            want = (weight[(*e, i, j)].float() * block).bfloat16()
            assert made[name][(*e, i, j)] == want


def test_what_cannot_be_read_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    plain, out = tmp_path / "plain", tmp_path / "out"
    tiny_model("qwen3_moe").save_pretrained(plain)
    with pytest.raises(FlexmoeError, match="is not quantized: use it as it is"):
        dequantize(plain, out)
    layer = "model.layers.0.self_attn.q_proj"
    for change in (
        {f"{layer}.qweight": torch.zeros(4, 4, dtype=torch.int32)},  # GPTQ
        {f"{layer}.weight_scale_inv": torch.ones(3, 5)},  # no blocks of this weight
        {f"{layer}.weight_scale_inv": torch.ones(2, 2, dtype=torch.uint8)},
    ):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(FlexmoeError, match=rf"{layer}.\w+ \(\w+\) is in no form that is"):
            dequantize(fp8(folder, **change), out)
    quantized(plain, {"quant_method": "gptq"}, tensors(plain))
    with pytest.raises(FlexmoeError, match=r"\(gptq\)(?!.*flexmoe dequantize)"):
        meta_model(plain)
    ragged = {"quant_method": "flexmoe", "format": 1}
    with pytest.raises(FlexmoeError, match="is a ragged export: start from its family"):
        dequantize(quantized(plain, ragged, tensors(plain)), out)
    (out / "something").mkdir(parents=True)
    with pytest.raises(FlexmoeError, match="exists already"):
        dequantize(fp8(tmp_path / "good"), out)
    assert [path.name for path in out.iterdir()] == ["something"]
