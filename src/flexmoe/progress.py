"""How long work reports: functions take a ``track`` that wraps what they iterate over."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

Item = TypeVar("Item")


class Track(Protocol):
    """Iterate over ``items`` and tell somebody how far it is."""

    def __call__(self, items: Sequence[Item], description: str) -> Iterable[Item]: ...


def silent(items: Sequence[Item], description: str) -> Iterable[Item]:
    """No report: the default in Python."""
    return items


def bar(items: Sequence[Item], description: str) -> Iterator[Item]:
    """A progress bar with the time left, on standard error: the default on the command line."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as progress:
        yield from progress.track(items, total=len(items), description=description)
