"""The state of long work, kept beside its result so that the same command goes on after a kill."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.training import processes

SETTINGS_NAME = "settings.json"
EVERY = 20.0  # seconds between two writes of the same state


def work_folder(out: str | Path) -> Path:
    """Where the state of making ``out`` lies: ``OUT.work`` beside it."""
    out = Path(out).expanduser().absolute()
    return out.with_name(f"{out.name}.work")


class Work:
    """The folder of one command's state. ``settings`` says what the command is: state of another
    command is refused, not continued."""

    def __init__(self, out: str | Path, settings: Mapping[str, Any]):
        self.path = work_folder(out)
        # the device is no part of the result, and every process has its own
        settings = {name: value for name, value in settings.items() if name != "device"}
        self.settings = json.loads(json.dumps(settings, default=str))
        found = self.path / SETTINGS_NAME
        if found.is_file():
            try:
                before = json.loads(found.read_bytes())
            except ValueError:
                raise FlexmoeError(
                    f"'{found}' is damaged: remove '{self.path}' to begin again"
                ) from None
            if before != self.settings:
                keys = before.keys() | self.settings.keys()
                other = sorted(k for k in keys if before.get(k) != self.settings.get(k))
                said = ", ".join(
                    f"{k} {before.get(k)} there, {self.settings.get(k)} now" for k in other[:3]
                )
                raise FlexmoeError(
                    f"'{self.path}' keeps the state of another command for the same folder "
                    f"({said}): give that command again to go on, or remove '{self.path}'"
                )

    def stage(self, name: str) -> Saved:
        """The state of one stage of the work."""
        return Saved(self, name)

    def clear(self) -> None:
        """All is done: the state goes."""
        if processes()[0] == 0:
            shutil.rmtree(self.path, ignore_errors=True)


class Saved:
    """Tensors and a step number of one stage, written beside and renamed, with a checksum."""

    def __init__(self, work: Work, name: str):
        self.work, self.name = work, name
        self.path = work.path / f"{name}.safetensors"
        self.written = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """(step, tensors) of the last write; None where there is none."""
        about = self.path.with_suffix(".json")
        if not about.is_file():
            return None
        record = json.loads(about.read_text())
        data = self.work.path / record["file"]
        try:
            if _sha256(data) != record["sha256"]:
                raise SafetensorError("its checksum is not what was written")
            return record["step"], load_file(data)
        except (OSError, SafetensorError) as error:
            raise FlexmoeError(
                f"the state in '{data}' is damaged ({error}): remove '{self.work.path}' to begin "
                "again"
            ) from None

    @property
    def due(self) -> bool:
        """Whether the last write is long enough ago; the first process's clock counts for all."""
        answer = [time.monotonic() - self.written >= EVERY]
        if processes()[1] > 1:
            dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state (of several processes the first one writes)."""
        self.written = time.monotonic()
        if processes()[0]:
            return
        self.work.path.mkdir(parents=True, exist_ok=True)
        _replace(self.work.path / SETTINGS_NAME, json.dumps(self.work.settings).encode())
        # two files in turn: the record names the one that is whole
        data = self.path.with_name(f"{self.name}-{step}.safetensors")
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, data)
        record = {
            "step": step,
            "file": data.name,
            "sha256": _sha256(data),
        }
        _replace(self.path.with_suffix(".json"), json.dumps(record).encode())
        for old in self.work.path.glob(f"{self.name}-*.safetensors"):
            if old != data:
                old.unlink()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:  # the state may be three times the weights: never whole in memory
        return hashlib.file_digest(file, "sha256").hexdigest()


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, path)
