"""Folders and files that appear complete or not at all, and records in JSON files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from flexmoe.errors import FlexmoeError

Form = TypeVar("Form", bound=BaseModel)

SEAL = "sha256"  # field of a JSON file with the hash of all its other fields


def refuse_existing(out: str | Path) -> None:
    """`FlexmoeError` if ``out`` is there and not an empty folder, or cannot be written."""
    out = Path(out).expanduser().absolute()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FlexmoeError(f"'{out}' exists already: give another name, or remove it first")
        above = next(folder for folder in out.parents if folder.exists())
    except OSError as error:
        raise _cannot_write(out, error) from None
    if not above.is_dir():
        raise FlexmoeError(f"cannot write '{out}': '{above}' is a file, give another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FlexmoeError(f"cannot write '{out}': no permission in '{above}', give another folder")


def refuse_full(out: str | Path, needed: int, what: str) -> None:
    """`FlexmoeError` unless ``needed`` bytes fit on the disk that ``out`` will be on."""
    if needed > (free := free_disk(out)):
        raise FlexmoeError(f"{what} needs {needed:,} bytes, the disk of '{out}' has {free:,} free")


def free_disk(path: str | Path) -> int:
    """Bytes that are free on the disk that ``path`` is, or would be, on."""
    path = Path(path).expanduser().absolute()
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def check_file(path: Path) -> Path:
    """``path`` if a file can be written there, in a folder that is made for it; else a
    `FlexmoeError`, before the work it is for."""
    if path.is_dir():
        raise FlexmoeError(f"cannot write '{path}': it is a folder, give a file")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise FlexmoeError(f"cannot write '{path}': '{above}' is no folder to write in")
    if path.exists() and not os.access(path, os.W_OK):
        raise FlexmoeError(f"cannot write '{path}': it is read-only, give another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()  # some folders say that they can and cannot
    except OSError as error:
        reason = f"{error.strerror}, give another folder"
        raise FlexmoeError(f"cannot write '{path}': {reason}") from None
    return path


class Strict(BaseModel):
    """A record that has no other fields than it declares, and does not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def write_sealed(path: Path, record: BaseModel) -> None:
    """Write a record and the hash of its fields as a JSON file, see `read_sealed`."""
    fields = record.model_dump()
    text = json.dumps({**fields, SEAL: _sha256(fields)}, indent=1) + "\n"
    write_whole(path, text.encode())


def read_sealed(path: Path, form: type[Form], version: int, again: str) -> Form:
    """The JSON file ``path`` as its ``form`` of this format ``version``. A `FlexmoeError` says what
    is wrong with it, and how to come by a sound one ``again``. Files from before there was a hash
    pass."""
    try:
        found = json.loads(path.read_bytes())
    except ValueError as error:  # not JSON, or not text
        raise FlexmoeError(f"{path} is not valid JSON ({error}): {again}") from None
    has = found.get("format") if isinstance(found, dict) else None
    if has != version:
        raise FlexmoeError(f"{path} has format {has}, this flexmoe reads format {version}: {again}")
    rest = {name: value for name, value in found.items() if name != SEAL}
    if SEAL in found and found[SEAL] != _sha256(rest):
        raise FlexmoeError(f"{path} is damaged or was edited: its sha256 does not fit, {again}")
    try:
        return form.model_validate(rest)
    except ValidationError as error:
        raise FlexmoeError(f"{path}: {first_problem(error)}: {again}") from None


def first_problem(error: ValidationError) -> str:
    """The first field that does not fit, and why."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def write_whole(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: beside its place, then renamed."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except BaseException:  # half of it would go along when the folder it is in is copied
        partial.unlink(missing_ok=True)
        raise


def file_sha256(path: str | Path) -> str:
    """Hash of a file's bytes, which are never all in memory."""
    with Path(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(fields: Mapping[str, Any]) -> str:
    # numbers and keys as JSON has them: the hash must not depend on what wrote the file
    canonical = json.dumps(json.loads(json.dumps(fields)), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _cannot_write(out: Path, error: OSError) -> FlexmoeError:
    return FlexmoeError(
        f"cannot write '{out}': {error.strerror} ('{error.filename}'), give another folder"
    )


@contextmanager
def written_beside(out: str | Path) -> Iterator[Path]:
    """A temporary folder beside ``out`` that becomes ``out`` when the block ends well, and goes
    when it does not. Those that killed processes left of the same ``out`` go at the start."""
    refuse_existing(out)
    out = Path(out).expanduser().absolute()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remove_stale(out)
        partial = _partial(out, os.getpid())
        partial.mkdir()
    except OSError as error:
        raise _cannot_write(out, error) from None
    try:
        yield partial
        if out.exists():
            out.rmdir()
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _partial(out: Path, pid: int) -> Path:
    return out.with_name(f".{out.name}.partial-{pid}")


def remove_stale(out: str | Path) -> None:
    """Remove what killed processes left of an unfinished ``out``."""
    out = Path(out).expanduser().absolute()
    stem = _partial(out, 0).name.removesuffix("0")
    for folder in out.parent.iterdir() if out.parent.is_dir() else ():
        pid = folder.name.removeprefix(stem)
        if folder.name.startswith(stem) and pid.isdecimal() and not _in_use(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)


def _in_use(pid: int) -> bool:
    """Whether another process has this number now. What bears ours was left by one before us:
    containers give the same numbers again."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True
