"""How long work reports: functions take a ``track`` that wraps what they iterate over."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, overload

if TYPE_CHECKING:
    from rich.console import Console

Item = TypeVar("Item")
LINE_EVERY = 30.0  # seconds between two lines where there is no terminal


class Track(Protocol):
    """Iterate over ``items`` and tell somebody how far it is."""

    def __call__(self, items: Sequence[Item], description: str) -> Iterable[Item]: ...


class Steps(Sequence[int]):
    """The numbers from ``start`` to ``stop`` - 1, of steps that read ``tokens`` tokens each (of a
    step that is one layer: its share of them); those before ``start`` were done by an earlier
    run."""

    def __init__(self, start: int, stop: int, tokens: float):
        self.range, self.start, self.tokens = range(start, stop), start, tokens

    def __len__(self) -> int:
        return len(self.range)

    @overload
    def __getitem__(self, at: int) -> int: ...
    @overload
    def __getitem__(self, at: slice) -> range: ...
    def __getitem__(self, at: int | slice) -> int | range:
        return self.range[at]


def silent(items: Sequence[Item], description: str) -> Iterable[Item]:
    """No report: the default in Python."""
    return items


def bar(items: Sequence[Item], description: str) -> Iterator[Item]:
    """The default on the command line, on standard error: a bar with the time left, tokens per
    second where they are known, and memory in use; a plain line now and then in a log file."""
    from rich.console import Console

    console = Console(stderr=True)
    shown = _on_terminal if console.is_terminal else _in_log
    yield from shown(items, description, console)


def _on_terminal(items: Sequence[Item], description: str, console: Console) -> Iterator[Item]:
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
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[use]}"),
    )
    begin, before = time.monotonic(), getattr(items, "start", 0)
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(
            description, total=before + len(items), completed=before, use=_use(items, 0, begin)
        )
        for done, item in enumerate(items, 1):
            yield item
            progress.update(task, advance=1, use=_use(items, done, begin))


def _in_log(items: Sequence[Item], description: str, console: Console) -> Iterator[Item]:
    begin, before = time.monotonic(), getattr(items, "start", 0)
    said = begin
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - said >= LINE_EVERY or done == len(items):
            said = now
            left = (now - begin) / done * (len(items) - done)
            console.print(
                f"{description} {before + done}/{before + len(items)}, {now - begin:.0f} s, "
                f"left {left:.0f} s, {_use(items, done, begin)}",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


def _use(items: Any, done: int, begin: float) -> str:
    """Tokens per second since the beginning, if the items know them, and memory in use."""
    import psutil
    import torch

    where, held = "", psutil.Process().memory_info().rss
    if torch.cuda.is_initialized():
        where, gpus = " on CUDA", range(torch.cuda.device_count())
        held = sum(map(torch.cuda.memory_reserved, gpus))
    text = f"{held / 2**30:.1f} GiB{where}"
    if done and (tokens := getattr(items, "tokens", 0)):
        rate = tokens * done / max(time.monotonic() - begin, 1e-9)
        text = (f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}") + f" tokens/s, {text}"
    return text
