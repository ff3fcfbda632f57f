"""The state of long work, kept beside its result so that the same command goes on after a kill."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.files import file_sha256, write_whole
from flexmoe.training import processes

log = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
# seconds between two writes of the same state; more where a write takes above a second
EVERY = 20.0


def work_folder(out: str | Path) -> Path:
    """Where the state of making ``out`` lies: ``OUT.work`` beside it."""
    out = Path(out).expanduser().absolute()
    return out.with_name(f"{out.name}.work")


def has_state(out: str | Path) -> bool:
    """Whether a run that made ``out`` left something to go on from: the record of a stage, or the
    plan."""
    return any(found.name != SETTINGS_NAME for found in work_folder(out).rglob("*.json"))


class Damaged(FlexmoeError):
    """The state of one stage cannot be read; that of the others can."""


class Work:
    """The folder of one command's state. ``settings`` says what the command is: state of another
    command is refused, not continued; its folder is taken over where it had saved nothing yet.
    ``begun`` says whether there is state of this command."""

    def __init__(self, out: str | Path, settings: Mapping[str, Any]):
        self.out, self.path = out, work_folder(out)
        # the device is no part of the result, and every process has its own
        self.settings = {name: value for name, value in settings.items() if name != "device"}
        self.begun = self._is_mine("settings", self.settings)

    @property
    def kept(self) -> bool:
        """Whether there is something to go on from."""
        return has_state(self.out)

    @contextmanager
    def on(self, **inputs: str) -> Iterator[None]:
        """Inside the block there is state of this command, run on these ``inputs`` (their hashes):
        with others than before it is not continued either. A `FlexmoeError` ends it: the same
        command would end in the same way, unless what is `Damaged` goes."""
        with self._alone():
            for part, mine in (("settings", self.settings), ("inputs", inputs)):
                self._is_mine(part, mine)
            if processes()[0] == 0:
                text = json.dumps({"settings": self.settings, "inputs": inputs}, default=str)
                write_whole(self.path / SETTINGS_NAME, text.encode())
            try:
                yield
            except Damaged:
                raise
            except (KeyboardInterrupt, SystemExit):
                if self.kept:
                    log.warning("interrupted: the same command goes on from '%s'", self.path)
                else:
                    log.warning("interrupted: nothing was saved yet, the same command begins again")
                raise
            except FlexmoeError:
                self.clear()
                raise

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Inside the block no other run of the command has this state: two would take the files
        away that the other one is about to read."""
        if processes()[0] != 0:
            yield
            return
        self.path.mkdir(parents=True, exist_ok=True)
        folder = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise FlexmoeError(
                f"another process is making '{self.out}' and has its state in '{self.path}': wait "
                "for it, or give another folder"
            ) from None
        except OSError:  # some network disks have no locks
            pass
        try:
            yield
        finally:
            os.close(folder)

    def _is_mine(self, part: str, mine: Mapping[str, Any]) -> bool:
        """Whether there is state of this command; a `FlexmoeError` where it is another's, or
        damaged, and something would be lost with it."""
        found = self.path / SETTINGS_NAME
        if not found.is_file():
            return False
        try:
            before = json.loads(found.read_bytes())[part]
        except (ValueError, LookupError, TypeError):
            if not self.kept:
                return False
            raise FlexmoeError(
                f"'{found}' is damaged: remove '{self.path}' to begin again"
            ) from None
        now = json.loads(json.dumps(mine, default=str))
        other = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
        if other and self.kept:
            said = ", ".join(f"{k} {before.get(k)} there, {now.get(k)} now" for k in other[:3])
            raise FlexmoeError(
                f"'{self.path}' keeps the state of another command for the same folder "
                f"({said}): give that command again to go on, or remove '{self.path}'"
            )
        return not other

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around the last step: what was computed outlives a full disk."""
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            log.warning("interrupted: the same command goes on from '%s'", self.path)
            raise
        except (OSError, FlexmoeError) as error:
            raise FlexmoeError(
                f"'{self.out}' could not be written: {error}. What was computed is kept in "
                f"'{self.path}': the same command goes on from there"
            ) from error

    def stage(self, name: str) -> Saved:
        """The state of one stage of the work."""
        return Saved(self, name)

    def clear(self) -> None:
        """The state goes; what says whose it is goes last, or half of it could pass for another
        command's."""
        if processes()[0] == 0 and self.path.is_dir():
            for found in self.path.iterdir():
                if found.is_dir():
                    shutil.rmtree(found)
                elif found.name != SETTINGS_NAME:
                    found.unlink()
            shutil.rmtree(self.path)


class Saved:
    """Tensors and a step number of one stage, written beside and renamed, with a checksum."""

    def __init__(self, work: Work, name: str):
        self.work, self.name = work, name
        self.path = work.path / f"{name}.safetensors"
        self.written, self.took = time.monotonic(), 0.0

    def load(self) -> tuple[int, dict[str, Tensor]] | None:
        """(step, tensors) of the last write; None where there is none."""
        about = self.path.with_suffix(".json")
        if not about.is_file():
            return None
        try:
            record = json.loads(about.read_text())
            data = self.work.path / record["file"]
            if file_sha256(data) != record["sha256"]:
                raise SafetensorError("its checksum is not what was written")
            return record["step"], load_file(data)
        except (OSError, ValueError, LookupError, SafetensorError) as error:
            raise Damaged(
                f"the state of stage '{self.name}' in '{self.work.path}' is damaged ({error}): "
                f"remove '{about}' to begin that stage again"
            ) from None

    @property
    def due(self) -> bool:
        """Whether the last write is long enough ago, so that writing takes a twentieth of the time
        at most; the first process's clock counts for all."""
        answer = [time.monotonic() - self.written >= EVERY * max(1.0, self.took)]
        if processes()[1] > 1:
            dist.broadcast_object_list(answer, src=0)
        return answer[0]

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep the state (of several processes the first one writes)."""
        begin = time.monotonic()
        if processes()[0] == 0:
            self._write(step, tensors)
        self.written = time.monotonic()
        self.took = self.written - begin

    def _write(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        self.work.path.mkdir(parents=True, exist_ok=True)
        # two files in turn: the record names the one that is whole
        data = self.path.with_name(f"{self.name}-{step}.safetensors")
        save_file({name: t.detach().contiguous().cpu() for name, t in tensors.items()}, data)
        record = {"step": step, "file": data.name, "sha256": file_sha256(data)}
        with data.open("rb") as stream:
            os.fsync(stream.fileno())
        write_whole(self.path.with_suffix(".json"), json.dumps(record).encode())
        for old in self.work.path.glob(f"{self.name}-*.safetensors"):
            if old != data:
                old.unlink()
