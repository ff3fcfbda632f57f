"""A Hugging Face checkpoint folder, read lazily, and its model without weights."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flexmoe.errors import FlexmoeError
from flexmoe.headers import (
    CURVE_NAME,
    DTYPE_NAMES,
    EXPORT_NAME,
    INDEX_NAME,
    Headers,
    one_line,
    read_json,
    refuse_quantized,
)
from flexmoe.plan import JSON_NAME, TENSORS_NAME

# Weights of other formats would be stale beside new ones, so they are never copied.
WEIGHT_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"}
DTYPES = {name: getattr(torch, dtype) for name, dtype in DTYPE_NAMES.items()}
# What the classes of transformers raise for a config.json that they cannot make a model of.
UNBUILDABLE = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError,
    TypeError, ValueError, StrictDataclassError,
)  # fmt: skip


def dtype_of(name: str, stored: str) -> torch.dtype:
    """The dtype that the tensor ``name`` is stored in; a `FlexmoeError` if it is not known."""
    if stored not in DTYPES:
        raise FlexmoeError(f"{name} has dtype {stored}, known are {', '.join(DTYPES)}")
    return DTYPES[stored]


class Checkpoint(Headers):
    """The safetensors files of one folder, see `Headers`, and the tensors in them. Opening it
    reads headers only."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        self.reads: dict[tuple[str, int | None], int] = {}  # bytes by tensor and row

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
        dtype = dtype_of(name, info.dtype)
        shape, size, start = info.shape, info.bytes, info.start
        if row is not None:
            shape, size = shape[1:], size // shape[0]
            start += row * size
        self.reads[name, row] = size
        if not size:
            return torch.empty(shape, dtype=dtype)
        buffer = bytearray(size)
        with (self.path / info.file).open("rb") as file:
            file.seek(start)
            if file.readinto(buffer) != size:
                raise FlexmoeError(f"{self.path / info.file} ends within {name}: it is damaged")
        return torch.frombuffer(buffer, dtype=dtype).view(shape)

    def beginning(self, name: str, size: int) -> bytes:
        """The first ``size`` bytes of a tensor, or all that it has."""
        info = self.tensors[name]
        with (self.path / info.file).open("rb") as file:
            file.seek(info.start)
            return file.read(min(size, info.bytes))

    def other_files(self) -> list[Path]:
        """Everything beside weights, their index and flexmoe's own files, relative to the
        folder: configs, tokenizer, chat template, custom code. Not what only lies there: hidden
        folders, the state of work, other checkpoints and plans."""
        own = {INDEX_NAME, JSON_NAME, TENSORS_NAME, EXPORT_NAME, CURVE_NAME}
        found = []
        for above, inside, names in os.walk(self.path):
            folder = Path(above)
            inside[:] = [name for name in inside if _belongs(folder / name)]
            for file in (folder / name for name in names):
                relative = file.relative_to(self.path)
                weights = file.suffix in WEIGHT_SUFFIXES or file.name.endswith(".index.json")
                if file.is_file() and not weights and str(relative) not in own:
                    found.append(relative)
        return sorted(found)


def _belongs(folder: Path) -> bool:
    """Whether a folder inside a checkpoint's is a part of it."""
    if folder.name.startswith(".") or folder.suffix == ".work" or (folder / JSON_NAME).is_file():
        return False
    return not ((folder / "config.json").is_file() and any(folder.glob("*.safetensors")))


def read_config(path: str | Path) -> dict[str, Any]:
    """config.json with the values that JSON cannot hold (infinities) decoded."""
    read_json(Path(path) / "config.json")  # says what is wrong with it
    return PreTrainedConfig.get_config_dict(path)[0]


def refuse_unknown(config: dict[str, Any]) -> None:
    """`FlexmoeError` for the config.json of a model that transformers has no code for."""
    if (kind := config.get("model_type")) not in CONFIG_MAPPING:
        own = " (its code comes with the checkpoint, and such code is never run)"
        raise FlexmoeError(
            f"transformers {transformers.__version__} has no model_type '{kind}'"
            + own * bool(config.get("auto_map"))
        )


def meta_model(
    path: str | Path, config: dict[str, Any] | None = None, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """The stock model of a checkpoint on the meta device: shapes and functions, no weights.

    ``config`` replaces what `read_config` gives, ``dtype`` the one it names. A ragged export gives
    the model at full width.
    """
    found = deepcopy(read_config(path) if config is None else config)
    refuse_quantized(path, found)
    found.pop("quantization_config", None)
    refuse_unknown(found)
    kind, names = found["model_type"], found.get("architectures") or []
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
            f"{Path(path) / 'config.json'} ({type(error).__name__}: {one_line(error)}): compare "
            "the file with that of the original checkpoint"
        ) from error
    raise FlexmoeError(
        f"{path}: transformers has no causal language model for model_type '{kind}', and none of "
        f"the classes in config.json's 'architectures' ({names})"
    )
