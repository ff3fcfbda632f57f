"""A quantized checkpoint in bfloat16, for models that are on the hub in FP8 or MXFP4 only.

Tensor by tensor, from file to file: the model is never loaded. Two forms are read, by names:

- FP8: ``X`` (float8_e4m3fn) times ``X_scale_inv`` or ``X_scale``, one factor for all of it, for
  each row or for each block (DeepSeek-V3, MiniMax-M2, Qwen3-FP8; FP8 of compressed-tensors).
- MXFP4: ``X_blocks`` and ``X_scales``, 32 values of 4 bits to a power of two (gpt-oss).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from flexmoe.checkpoint import Checkpoint
from flexmoe.errors import FlexmoeError
from flexmoe.exporter import copy_others, write_config
from flexmoe.files import refuse_existing, refuse_full, written_beside
from flexmoe.headers import refuse_ragged, resolve
from flexmoe.progress import Track, silent
from flexmoe.shards import Entry, Shards, verify, write

FACTORS = ("_scale_inv", "_scale")  # after the name of a weight in FP8
OF_ACTIVATIONS = ("activation_scale", "input_scale")  # beside such a weight, and gone with it
FLOATS = {"F32", "BF16", "F16", "F8_E8M0"}  # of factors
# Numbers that only a rule can read; what a model needs as it is has other types
PACKED = {"U8", "I8", "I32", "F8_E4M3", "F8_E5M2", "F8_E8M0"}


def dequantize(model: str | Path, out: str | Path, track: Track = silent) -> Path:
    """Write the quantized checkpoint ``model`` (a folder or hub id) into the new folder ``out``:
    quantized weights in bfloat16, every other tensor and file as it is.

    MXFP4 is exact in bfloat16; FP8 times its factor, a product in float32, is rounded to it. Memory
    holds the largest tensor twice, and the largest matrix in float32. ``out`` appears complete,
    read back and compared, or not at all; a `FlexmoeError` says what stands in the way.
    """
    refuse_existing(out)
    source = Checkpoint(resolve(model, quantized=True))
    refuse_ragged(source.path, source.config)
    config, about = _plain(source.config)
    if not about:
        raise FlexmoeError(f"{source.path} is not quantized: use it as it is")
    shards = _shards(source, about)
    refuse_full(out, sum(e.bytes for shard in shards.values() for e in shard), "the checkpoint")
    with written_beside(out) as partly:
        copy_others(source, partly)
        write_config(source, partly, config)
        write(partly, shards, track)
        verify(Checkpoint(partly), shards, track)
    return Path(out).expanduser()


def _plain(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """config.json of the model in bfloat16, and what it said of the quantization."""
    plain = {"dtype": "bfloat16"} | config
    about = plain.pop("quantization_config", None)
    if isinstance(text := plain.get("text_config"), dict):  # where some multimodal models have it
        plain["text_config"] = {k: v for k, v in text.items() if k != "quantization_config"}
        about = about or text.get("quantization_config")
    return plain, about or {}


def _shards(source: Checkpoint, about: dict[str, Any]) -> Shards:
    """What to write, by shard file; `FlexmoeError` for a tensor that no rule reads."""
    gone, entries = set[str](), dict[str, Entry]()
    for name, info in source.tensors.items():
        factor = next((name + end for end in FACTORS if name + end in source.tensors), "")
        stem = name.removesuffix("_blocks")
        if info.dtype == "F8_E4M3" and factor and (block := _block(source, name, factor, about)):
            make = partial(_made, source, name, factor, info.shape, partial(_fp8, block=block))
            entries[name] = Entry(name, "BF16", info.shape, make)
            above = name.rpartition(".")[0]
            gone |= {factor, *(f"{above}.{scale}" for scale in OF_ACTIVATIONS)}
        elif stem != name and f"{stem}_scales" in source.tensors and len(info.shape) == 4:
            E, outputs, groups, packed = info.shape
            shape = (E, groups * packed * 2, outputs)  # the other way round, as gpt-oss has them
            make = partial(_made, source, name, f"{stem}_scales", shape, _mxfp4)
            entries[name] = Entry(stem, "BF16", shape, make)
            gone.add(f"{stem}_scales")
        else:
            make = partial(source.tensor, name)
            entries[name] = Entry(name, info.dtype, info.shape, make)
    shards: Shards = {file: [] for file in source.files}
    for name, entry in entries.items():
        if name in gone:
            continue
        if entry.dtype in PACKED:
            raise FlexmoeError(
                f"{source.path} is quantized ({about.get('quant_method')}), and {name} "
                f"({entry.dtype}) is in no form that is read here, which are FP8 with factors and "
                "MXFP4: load it with its own library and save it in bfloat16"
            )
        shards[source.tensors[name].file].append(entry)
    return shards


def _block(
    source: Checkpoint, name: str, factor: str, about: dict[str, Any]
) -> tuple[int, int] | None:
    """Rows and columns of a weight that share a factor; None if its factors have another form."""
    *many, rows, columns = source.tensors[name].shape
    if source.tensors[factor].dtype not in FLOATS:
        return None
    shape = source.tensors[factor].shape
    if shape in ((), (1,)):
        return rows, columns
    if shape[:-2] != tuple(many):
        return None
    block = []
    # the last block of 128 may be cut short, so the number of blocks alone does not say their size
    for size, n, said in zip((rows, columns), shape[-2:], _said(about), strict=True):
        if said and n == -(-size // said):
            block.append(said)
        elif n and size % n == 0:
            block.append(size // n)
        else:
            return None
    return block[0], block[1]


def _said(about: dict[str, Any]) -> list[int]:
    """The size of a block in quantization_config, or [0, 0]."""
    groups = about.get("config_groups") or {}  # of compressed-tensors
    blocks = [(group.get("weights") or {}).get("block_structure") for group in groups.values()]
    return about.get("weight_block_size") or next(filter(None, blocks), None) or [0, 0]


def _made(
    source: Checkpoint,
    name: str,
    factor: str,
    shape: tuple[int, ...],
    of: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """A tensor in bfloat16; one of all experts is made expert by expert."""
    if len(shape) == 2:
        return of(source.tensor(name), source.tensor(factor))
    each = len(source.tensors[factor].shape) > 1
    made = torch.empty(shape, dtype=torch.bfloat16)
    for e, expert in enumerate(made):
        expert.copy_(of(source.tensor(name, e), source.tensor(factor, e if each else None)))
    return made


def _fp8(weight: Tensor, factors: Tensor, block: tuple[int, int]) -> Tensor:
    factors = factors.float().reshape(-1, 1) if factors.dim() < 2 else factors.float()
    for axis, (size, n) in enumerate(zip(weight.shape, block, strict=True)):
        factors = factors.repeat_interleave(n, axis).narrow(axis, 0, size)
    return weight.float().mul_(factors).bfloat16()


def _mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    return convert_moe_packed_tensors(blocks[None], scales[None])[0]
