"""A Hugging Face checkpoint folder, read lazily, and its model without weights."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

import flexmoe
from flexmoe.errors import FlexmoeError
from flexmoe.plan import JSON_NAME, TENSORS_NAME

INDEX_NAME = "model.safetensors.index.json"
EXPORT_NAME = "flexmoe_export.json"  # what an export says about itself
CURVE_NAME = "evaluation.json"  # the measured curve of a family, see `flexmoe.evaluation.curve`
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
# What the classes of transformers raise for a config.json that they cannot make a model of.
UNBUILDABLE = (
    ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError,
    ValueError, StrictDataclassError,
)  # fmt: skip


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


def is_hub_id(model: str) -> bool:
    """Whether ``model`` looks like ``owner/name``."""
    return not model.startswith((".", "/", "~")) and model.count("/") == 1


def _download(model: str) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
    wanted += ["README.md", "LICENSE*"]  # the licence goes on to what is made of it
    others = ["*/*.safetensors", "original/*", "consolidated*"]  # the same weights once more
    if not is_hub_id(model):
        raise FlexmoeError(
            f"there is no folder '{model}', and it is no hub id either (those look like "
            "'allenai/OLMoE-1B-7B-0924'; 'tiny' is the model inside the package)"
        )
    try:
        config = Path(hf_hub_download(model, "config.json"))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _no_download(model, error) from error
    _refuse_quantized(model, read_json(config))  # before hundreds of gigabytes come down
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=others))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _no_download(model, error) from error


def _no_download(model: str, error: Exception) -> FlexmoeError:
    return FlexmoeError(
        f"'{model}' is no folder here and could not be downloaded from the hub: "
        f"{_one_line(error)}. Check the name and the connection; a gated model "
        "needs 'hf auth login'; without a network give the path of a local copy."
    )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a `FlexmoeError` that says what is wrong with it."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not text
        raise FlexmoeError(f"{path} is not valid JSON ({error}): download it again") from None
    if not isinstance(found, dict):
        raise FlexmoeError(
            f"{path} holds a {type(found).__name__} where an object {{...}} is expected: "
            "download it again"
        )
    return found


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
    `TensorInfo`, ``files`` the shards in order. Raises `FlexmoeError` if one of these files is
    missing, damaged or cut short.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        index = self.path / INDEX_NAME
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise FlexmoeError(f"{index} has no 'weight_map': damaged, download it again")
            self.files = sorted(set(map(str, weight_map.values())))
        else:
            self.files = ["model.safetensors"]
        self.tensors: dict[str, TensorInfo] = {}
        self.reads: dict[tuple[str, int | None], int] = {}  # bytes by tensor and row
        for file in self.files:
            self.tensors |= read_header(self.path / file)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.tensors.values())

    @property
    def bytes_read(self) -> int:
        """Bytes of all that was read, what was read again counted once."""
        return sum(
            size
            for (name, row), size in self.reads.items()
            if row is None or (name, None) not in self.reads
        )

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
        self.reads[name, row] = size
        if not size:
            return torch.empty(shape, dtype=DTYPES[info.dtype])
        buffer = bytearray(size)
        with (self.path / info.file).open("rb") as file:
            file.seek(start)
            if file.readinto(buffer) != size:
                raise FlexmoeError(f"{self.path / info.file} ends within {name}: it is damaged")
        return torch.frombuffer(buffer, dtype=DTYPES[info.dtype]).view(shape)

    def other_files(self) -> list[Path]:
        """Everything beside weights, their index and flexmoe's own files, relative to the
        folder: configs, tokenizer, chat template, custom code."""
        own = {INDEX_NAME, JSON_NAME, TENSORS_NAME, EXPORT_NAME, CURVE_NAME}
        found = []
        for file in sorted(self.path.rglob("*")):
            relative = file.relative_to(self.path)
            hidden = any(part.startswith(".") for part in relative.parts[:-1])
            weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
            if file.is_file() and not hidden and not weights and str(relative) not in own:
                found.append(relative)
        return found


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file; a `FlexmoeError` if it is missing or damaged."""
    if not path.is_file():
        raise FlexmoeError(f"{path} is missing: the checkpoint is incomplete, download it again")
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise FlexmoeError(
                f"{path} is not a safetensors file or is cut short, download it again"
            )
        text = file.read(size)
    try:
        header = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {
            name: TensorInfo(
                path.name, entry["dtype"], tuple(entry["shape"]), stop - start, 8 + size + start
            )
            for name, entry in header.items()
            for start, stop in [entry["data_offsets"]]
        }
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise FlexmoeError(
            f"{path} has a damaged safetensors header ({_one_line(error)}): download it again"
        ) from None
    if 8 + size + end != path.stat().st_size:
        raise FlexmoeError(
            f"{path} has {path.stat().st_size} bytes where its header says {8 + size + end}: "
            "cut short or damaged, download it again"
        )
    return tensors


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json with the values that JSON cannot hold (infinities) decoded."""
    read_json(Path(path) / "config.json")  # says what is wrong with it
    return PreTrainedConfig.get_config_dict(path)[0]


def _refuse_quantized(where: str | Path, config: dict[str, Any]) -> None:
    found = config.get("quantization_config") or {}
    method = found.get("quant_method", "flexmoe") if isinstance(found, dict) else found
    if method != "flexmoe":
        raise FlexmoeError(
            f"{where} is quantized ({method}): channels of quantized experts cannot be reordered. "
            "Start from the checkpoint in bf16 and quantize the export."
        )


def meta_model(
    path: str | Path, config: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The stock model of a checkpoint on the meta device: shapes and functions, no weights.

    ``config`` replaces what `read_config` gives, ``dtype`` the one it names. A ragged export gives
    the model at full width.
    """
    found = deepcopy(read_config(path) if config is None else config)
    _refuse_quantized(path, found)
    found.pop("quantization_config", None)
    kind, names = found.get("model_type"), found.get("architectures") or []
    if kind not in CONFIG_MAPPING:
        own = " (its code comes with the checkpoint, and such code is never run)"
        raise FlexmoeError(
            f"transformers {transformers.__version__} has no model_type '{kind}'"
            + own * bool(found.get("auto_map"))
        )
    try:
        settings = CONFIG_MAPPING[kind].from_dict(found)
        given = {} if dtype is None else {"dtype": dtype}
        with torch.device("meta"):
            if type(settings) in AutoModelForCausalLM._model_mapping:
                return AutoModelForCausalLM.from_config(settings, **given)
            for name in names:
                if hasattr(transformers, name):
                    return getattr(transformers, name)._from_config(settings, **given)
    except UNBUILDABLE as error:
        raise FlexmoeError(
            f"transformers {transformers.__version__} cannot build the '{kind}' model of "
            f"{Path(path) / 'config.json'} ({type(error).__name__}: {_one_line(error)}): compare "
            "the file with that of the original checkpoint"
        ) from error
    raise FlexmoeError(
        f"{path}: transformers has no causal language model for model_type '{kind}', and none of "
        f"the classes in config.json's 'architectures' ({names})"
    )
