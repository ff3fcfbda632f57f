"""Folders that appear complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flexmoe.errors import FlexmoeError


def refuse_existing(out: str | Path) -> None:
    """`FlexmoeError` if ``out`` is there and not an empty folder, or cannot be written."""
    out = Path(out).expanduser().absolute()
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise FlexmoeError(f"'{out}' exists already: give another folder, or remove it first")
        above = next(folder for folder in out.parents if folder.exists())
    except OSError as error:
        raise _cannot_write(out, error) from None
    if not above.is_dir():
        raise FlexmoeError(f"cannot write '{out}': '{above}' is a file, give another folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise FlexmoeError(f"cannot write '{out}': no permission in '{above}', give another folder")


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
