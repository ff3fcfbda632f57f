"""A Hugging Face checkpoint folder, read lazily, and its model without weights."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import flexmoe
from flexmoe.errors import FlexmoeError
from flexmoe.plan import JSON_NAME, TENSORS_NAME

INDEX_NAME = "model.safetensors.index.json"
# Weights of other formats would be stale beside new ones, so they are never copied.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
# Names of the safetensors format.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip


def resolve(model: str | Path) -> Path:
    """The folder of a checkpoint: a local folder, ``tiny`` (the model inside the package) or a
    hub id, which is downloaded. A `FlexmoeError` says why it cannot be used."""
    path = Path(model).expanduser()
    if str(model) == "tiny":
        path = Path(flexmoe.__file__).parent / "tiny" / "model"
    elif not path.is_dir():
        path = _download(str(model))
    if not (path / "config.json").is_file():
        raise FlexmoeError(f"{path} is not a Hugging Face checkpoint: it has no config.json")
    if not any(path.glob("*.safetensors")):
        pickled = any(path.glob("*.bin")) or any(path.glob("*.pth"))
        raise FlexmoeError(
            f"{path} has no *.safetensors: "
            + (
                "its weights are pickles, which can run code when read and cannot be read piece "
                "by piece. Load it with transformers and save_pretrained() it once."
                if pickled
                else "the weights are missing, download them again"
            )
        )
    return path


def _download(model: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise FlexmoeError(
            f"there is no folder '{model}', and it is no hub id either (those look like "
            "'allenai/OLMoE-1B-7B-0924'; 'tiny' is the model inside the package)"
        )
    try:
        return Path(snapshot_download(model, allow_patterns=wanted))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise FlexmoeError(
            f"'{model}' is no folder here and could not be downloaded from the hub: "
            f"{str(error).splitlines()[0]}. Check the name and the connection; a gated model "
            "needs 'hf auth login'; without a network give the path of a local copy."
        ) from error


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint as its header describes it; ``file`` is the shard's name and
    ``start`` where its bytes begin there."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int


class Checkpoint:
    """The safetensors files of one folder. Opening it reads headers only.

    ``config`` is config.json as it stands, ``tensors`` maps each tensor's name to its
    `TensorInfo`, ``files`` the shards in order. Raises `FlexmoeError` if a file named by the index
    is missing, damaged or cut short.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config: dict[str, Any] = json.loads((self.path / "config.json").read_text())
        index = self.path / INDEX_NAME
        if index.is_file():
            self.files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            self.files = ["model.safetensors"]
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            self.tensors |= _read_header(self.path / file)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.tensors.values())

    def tensor(self, name: str, row: int | None = None) -> Tensor:
        """One tensor, or one row of its first axis, and no other bytes.

        It is read, not mapped: mapped pages would count as memory of this process until the
        system wants them back, and add up to the whole checkpoint.
        """
        info = self.tensors[name]
        if info.dtype not in DTYPES:
            raise FlexmoeError(f"{name} has dtype {info.dtype}, known are {', '.join(DTYPES)}")
        shape, size, start = info.shape, info.bytes, info.start
        if row is not None:
            shape, size = shape[1:], size // shape[0]
            start += row * size
        if not size:
            return torch.empty(shape, dtype=DTYPES[info.dtype])
        buffer = bytearray(size)
        with (self.path / info.file).open("rb") as file:
            file.seek(start)
            if file.readinto(buffer) != size:
                raise FlexmoeError(f"{self.path / info.file} ends within {name}: it is damaged")
        return torch.frombuffer(buffer, dtype=DTYPES[info.dtype]).view(shape)

    def other_files(self) -> list[Path]:
        """Everything beside weights, their index and flexmoe's own two files, relative to the
        folder: configs, tokenizer, chat template, custom code."""
        own = {INDEX_NAME, JSON_NAME, TENSORS_NAME}
        found = []
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            hidden = any(part.startswith(".") for part in relative.parts[:-1])
            weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
            if file.is_file() and not hidden and not weights and str(relative) not in own:
                found.append(relative)
        return found


def _read_header(path: Path) -> dict[str, TensorInfo]:
    if not path.is_file():
        raise FlexmoeError(f"{path} is missing: the checkpoint is incomplete, download it again")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise FlexmoeError(f"{path} is not a safetensors file or is cut short")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + size + end != path.stat().st_size:
        raise FlexmoeError(
            f"{path} has {path.stat().st_size} bytes where its header says {8 + size + end}: "
            "cut short or damaged, download it again"
        )
    return {
        name: TensorInfo(
            path.name, entry["dtype"], tuple(entry["shape"]), stop - start, 8 + size + start
        )
        for name, entry in header.items()
        for start, stop in [entry["data_offsets"]]
    }


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json with the values that JSON cannot hold (infinities) decoded."""
    return PreTrainedConfig.get_config_dict(path)[0]


def meta_model(path: str | Path, config: dict[str, Any] | None = None) -> PreTrainedModel:
    """The stock model of a checkpoint on the meta device: shapes and functions, no weights.

    ``config`` replaces what `read_config` gives. A ragged export gives the model at full width.
    """
    found = deepcopy(read_config(path) if config is None else config)
    method = (found.pop("quantization_config", None) or {}).get("quant_method", "flexmoe")
    if method != "flexmoe":
        raise FlexmoeError(
            f"{path} is quantized ({method}): channels of quantized experts cannot be reordered. "
            "Start from the checkpoint in bf16 and quantize the export."
        )
    kind, names = found.get("model_type"), found.get("architectures") or []
    if kind not in CONFIG_MAPPING:
        raise FlexmoeError(f"transformers {transformers.__version__} has no model_type '{kind}'")
    settings = CONFIG_MAPPING[kind].from_dict(found)
    with torch.device("meta"):
        if type(settings) in AutoModelForCausalLM._model_mapping:
            return AutoModelForCausalLM.from_config(settings)
        for name in names:
            if hasattr(transformers, name):
                return getattr(transformers, name)(settings)
    raise FlexmoeError(
        f"{path}: transformers has no causal language model for model_type '{kind}', and none of "
        f"the classes in config.json's 'architectures' ({names})"
    )
