"""The files of a checkpoint folder, read with plain Python: config.json and safetensors headers.

Nothing here imports torch or transformers: `doctor` answers before those are loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flexmoe
from flexmoe.errors import FlexmoeError

INDEX_NAME = "model.safetensors.index.json"
EXPORT_NAME = "flexmoe_export.json"  # what an export says about itself
CURVE_NAME = "evaluation.json"  # the measured curve of a family, see `flexmoe.evaluation.curve`
READABLE = (
    "fp8",
    "mxfp4",
    "compressed-tensors",
)  # quantizations that `dequantize` reads, or some of
# Names of the safetensors format, and torch's.
DTYPE_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8",
    "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8",
    "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip


def resolve(model: str | Path, quantized: bool = False) -> Path:
    """The folder of a checkpoint: a local folder, else ``tiny`` (the model inside the package) or
    a hub id, which is downloaded, a ``quantized`` one only if that is asked for. A `FlexmoeError`
    says why it cannot be used."""
    path = Path(model).expanduser()
    if not path.is_dir():
        packaged = Path(flexmoe.__file__).parent / "tiny" / "model"
        path = packaged if str(model) == "tiny" else _download(str(model), quantized)
    if not (path / "config.json").is_file():
        raise FlexmoeError(f"{path} is not a Hugging Face checkpoint: it has no config.json")
    if not any(path.glob("*.safetensors")) and not (path / INDEX_NAME).is_file():
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


def local_folder(model: str | Path) -> Path:
    """The folder of a checkpoint that is on this machine; nothing is downloaded."""
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return path
    if path.is_dir() or not is_hub_id(str(model)):
        return resolve(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(model), local_files_only=True))
    except (LocalEntryNotFoundError, ValueError):
        raise FlexmoeError(
            f"'{model}' is neither a folder here nor a model in the cache of the hub, and nothing "
            f"is downloaded only to look at it: get it with 'hf download {model}'"
        ) from None


def is_hub_id(model: str) -> bool:
    """Whether ``model`` looks like ``owner/name``."""
    return not model.startswith((".", "/", "~")) and model.count("/") == 1


def _download(model: str, quantized: bool) -> Path:
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
    from flexmoe.checkpoint import refuse_unknown

    if not quantized:
        refuse_quantized(model, read_json(config))  # before hundreds of gigabytes come down
    refuse_unknown(read_json(config))
    try:
        return Path(snapshot_download(model, allow_patterns=wanted, ignore_patterns=others))
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise _no_download(model, error) from error


def _no_download(model: str, error: Exception) -> FlexmoeError:
    return FlexmoeError(
        f"'{model}' is no folder here and could not be downloaded from the hub: "
        f"{one_line(error).rstrip('.')}. Check the name and the connection; a gated model "
        "needs 'hf auth login'; without a network give the path of a local copy."
    )


def one_line(error: Exception) -> str:
    """What an error of a library says, for a message."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a `FlexmoeError` that says what is wrong with it."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not text
        raise FlexmoeError(
            f"{path} is not valid JSON ({error}): download or make it again"
        ) from None
    if not isinstance(found, dict):
        raise FlexmoeError(
            f"{path} holds a {type(found).__name__} where an object {{...}} is expected: "
            "download or make it again"
        )
    return found


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a checkpoint as its header describes it; ``file`` is the shard's name, with
    the folders inside the checkpoint's that it stands in, and ``start`` where its bytes begin."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    bytes: int
    start: int


class Headers:
    """The safetensors files of one folder as their headers describe them.

    ``config`` is config.json as it stands, ``tensors`` maps each tensor's name to its
    `TensorInfo`, ``files`` the shards in order. Raises `FlexmoeError` if one of these files is
    missing, damaged or cut short.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config: dict[str, Any] = read_json(self.path / "config.json")
        index, alone = self.path / INDEX_NAME, "model.safetensors"
        self.files = [alone]
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise FlexmoeError(
                    f"{index} has no 'weight_map': damaged, download or make it again"
                )
            files = sorted(set(map(str, weight_map.values())))
            for place in map(Path, files):  # written anew, one outside would be elsewhere
                if place.is_absolute() or ".." in place.parts:
                    raise FlexmoeError(
                        f"{index} names the shard '{place}' outside of its folder: damaged, "
                        "download or make it again"
                    )
            # one that does not name the file of all weights beside it is left from shards that
            # stood here before: transformers reads that file, and leaves such an index
            if alone in files or not (self.path / alone).is_file():
                self.files = files
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            self.tensors |= read_header(self.path, file)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.bytes for info in self.tensors.values())


def read_header(folder: Path, name: str) -> dict[str, TensorInfo]:
    """The tensors of the safetensors file ``name`` in ``folder``; a `FlexmoeError` if it is missing
    or damaged."""
    path = folder / name
    if not path.is_file():
        raise FlexmoeError(
            f"{path} is missing: the checkpoint is incomplete, download or make it again"
        )
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > path.stat().st_size:
            raise FlexmoeError(
                f"{path} is not a safetensors file or is cut short, download or make it again"
            )
        text = file.read(size)
    try:
        header = {k: v for k, v in json.loads(text).items() if k != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
        tensors = {
            tensor: TensorInfo(
                name, entry["dtype"], tuple(entry["shape"]), stop - start, 8 + size + start
            )
            for tensor, entry in header.items()
            for start, stop in [entry["data_offsets"]]
        }
    except (ValueError, AttributeError, LookupError, TypeError) as error:
        raise FlexmoeError(
            f"{path} has a damaged safetensors header ({one_line(error)}): download or make it "
            "again"
        ) from None
    if 8 + size + end != path.stat().st_size:
        raise FlexmoeError(
            f"{path} has {path.stat().st_size} bytes where its header says {8 + size + end}: "
            "cut short or damaged, download or make it again"
        )
    return tensors


def refuse_ragged(where: str | Path, config: dict[str, Any]) -> None:
    """`FlexmoeError` for the config.json of a ragged export."""
    found = config.get("quantization_config")
    if isinstance(found, dict) and found.get("quant_method", "flexmoe") == "flexmoe":
        raise FlexmoeError(f"{where} is a ragged export: start from its family instead")


def refuse_quantized(where: str | Path, config: dict[str, Any]) -> None:
    """`FlexmoeError` for a config.json that names a quantization of others."""
    text = config.get("text_config")  # where some multimodal models have it
    within = text.get("quantization_config") if isinstance(text, dict) else None
    found = config.get("quantization_config") or within or {}
    method = found.get("quant_method", "flexmoe") if isinstance(found, dict) else found
    if method != "flexmoe":
        raise FlexmoeError(
            f"{where} is quantized ({method}): channels of quantized experts cannot be reordered. "
            "Start from the checkpoint in bf16 and quantize the export"
            + (f": 'flexmoe dequantize {where} -o DIR' makes one." if method in READABLE else ".")
        )
