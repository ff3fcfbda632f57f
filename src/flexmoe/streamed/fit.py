"""The observe pass within a given memory: what must fit is checked, how much goes at a time picked.

What a layer needs beside its weights depends on its attention, its routing and the length of a
window, so it is measured: one, two, four ... windows, at last a batch, go through the first MoE
layer as they will in the pass, as long as so many would fit by what was seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flexmoe.data import Windows
from flexmoe.errors import FlexmoeError
from flexmoe.evidence import Evidence
from flexmoe.files import free_disk
from flexmoe.memory import MicroBatch, MostHeld, gib, held
from flexmoe.progress import Track, silent
from flexmoe.resume import Saved
from flexmoe.statistics import find_statistics, passes
from flexmoe.streamed.activations import Activations
from flexmoe.streamed.layer_loader import LayerLoader
from flexmoe.streamed.streaming import Pass, gather_streamed
from flexmoe.training import CHUNK

# What is left alone for what the allocator keeps and libraries take later: measured, a few percent.
SLACK_SHARE, SLACK_BYTES = 0.05, 32 * 2**20
COPIES = 6  # of the logits in float32, the gradient and what the loss makes of them among these


def check_memory(loader: LayerLoader, memory: int, beside: tuple[str, int] | None = None) -> None:
    """`FlexmoeError` if ``memory`` bytes cannot hold what is in memory at any time, ``beside``
    (what, bytes) with it: known from config.json, before a weight is read."""
    now, outside, layer = held(loader.device), loader.bytes_outside, max(loader.bytes_of)
    what, more = beside or ("", 0)
    if (needed := now + outside + layer + more) > _usable(memory):
        raise FlexmoeError(
            f"{gib(memory)} of memory are too little: {gib(now)} are held already, embeddings and "
            f"head take {gib(outside)}, the largest decoder layer {gib(layer)} "
            f"({str(loader.dtype).removeprefix('torch.')})"
            + (f", its {what} {gib(more)}" if beside else "")
            + f". Give --memory more than {gib(_with_slack(needed))}"
        )


def _usable(memory: int) -> int:
    return int(memory * (1 - SLACK_SHARE)) - SLACK_BYTES


def _with_slack(needed: int) -> int:
    return int((needed + SLACK_BYTES) / (1 - SLACK_SHARE))


def gather_within(
    memory: int,
    loader: LayerLoader,
    windows: Windows,
    names: Sequence[str],
    *,
    batch_size: int,
    saved: Saved,
    seed: int = 0,
    track: Track = silent,
) -> Evidence:
    """`gather_streamed` with as many windows of a batch, and tokens at the head, at a time as fit
    into ``memory`` bytes. Raises `FlexmoeError` if one window does not fit (or one batch, of
    statistics that look at whole ones), or the disk is too small for the activations."""
    kept = saved.work.stage("sizes")
    if (state := kept.load()) is None:  # measured once: with other sizes sums would round otherwise
        # of several passes the first one is the largest: what comes after is of whole experts
        wanted = passes(names)[0]

        def make(some: Windows, files: Activations, micro: MicroBatch) -> Pass:
            return Pass(loader, some, wanted, files, len(some.ids), micro, CHUNK)

        folder = saved.work.path / "rehearsal"
        state = 0, pick_sizes(memory, loader, windows, make, batch_size, folder)
        kept.save(*state)
    fit, size = int(state[1]["micro_batch"]), min(batch_size, len(windows.ids))
    if fit < size and (whole := [s.name for s in find_statistics(names) if s.whole]):
        raise FlexmoeError(
            f"{whole[0]} looks at batches as a whole, and of {size} windows {fit} fit into "
            f"{gib(memory)} at a time: use --batch-size {fit}, or a larger --memory"
        )
    return gather_streamed(
        loader,
        windows,
        names,
        batch_size=batch_size,
        micro_batch=fit,
        chunk=int(state[1]["chunk"]),
        seed=seed,
        saved=saved,
        track=track,
    )


def pick_sizes(
    memory: int,
    loader: LayerLoader,
    windows: Windows,
    make: Callable[[Windows, Activations, MicroBatch], Pass],
    batch_size: int,
    folder: Path,
) -> dict[str, Tensor]:
    """Windows at a time (``micro_batch``), and tokens at the head (``chunk``), that fit into
    ``memory`` bytes for the pass that ``make`` makes of a few windows; it is tried in ``folder``.
    Raises `FlexmoeError` if one window does not fit, or the disk is too small."""
    base, first, largest = held(loader.device), min(loader.experts), max(loader.bytes_of)
    files = Activations(folder, loader.device)
    ids, usable = windows.ids, _usable(memory)

    def trial(number: int) -> Pass:
        some = Windows(ids[:number], "", ("",), torch.zeros(number))
        return make(some, files, MicroBatch(number))

    def most(number: int) -> int:
        with MostHeld(loader.device) as seen:
            trial(number).rehearse(first)
        return seen.bytes + largest - loader.bytes_of[first]

    try:
        number, peak = 1, most(1)
        both = trial(1).backward_wanted
        _check_disk(files, len(ids) * (len(loader.layers) + 1 if both else 2))
        if peak > usable:
            raise FlexmoeError(
                f"{gib(memory)} of memory are too little for one window of {ids.shape[1]} tokens: "
                f"it takes {gib(peak)}. Give --memory more than {gib(_with_slack(peak))}, or a "
                "shorter --seq-len"
            )
        each = max(0, peak - base - largest)
        wanted = min(batch_size, len(ids))
        while number < wanted and peak + (min(2 * number, wanted) - number) * each <= usable:
            before, more = peak, min(2 * number, wanted)
            peak = most(more)
            if peak > usable:
                break
            each, number = max(0, peak - before) // (more - number), more
    finally:
        shutil.rmtree(files.path, ignore_errors=True)
    vocabulary = loader.model.config.get_text_config().vocab_size
    tokens = (usable - held(loader.device)) // (COPIES * 4 * vocabulary)
    sizes = {"micro_batch": number, "chunk": max(1, min(CHUNK, tokens))}
    return {name: torch.tensor(value) for name, value in sizes.items()}


def _check_disk(files: Activations, kept: int) -> None:
    """`FlexmoeError` if what layers give, ``kept`` times that for one window, is too much for the
    disk."""
    of_one = sum(file.stat().st_size for file in files.path.glob("output-0/*"))
    needed, free = of_one * kept, free_disk(files.path)
    if needed > free:
        raise FlexmoeError(
            f"the activations of all windows need {gib(needed)} of disk, '{files.path.parent}' has "
            f"{gib(free)} free: use fewer --samples, a shorter --seq-len, or --out on another disk"
        )
