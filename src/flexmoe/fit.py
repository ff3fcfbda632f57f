"""The observe pass within a given memory: what must fit is checked, how much goes at a time picked.

What a layer needs beside its weights depends on its attention, its routing and the length of a
window, so it is measured: one, two, four ... windows go through the first MoE layer as they will
in the pass, as long as twice as many would fit by what was seen.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence

import torch
from torch import Tensor

from flexmoe.activations import Activations
from flexmoe.errors import FlexmoeError
from flexmoe.layer_loader import LayerLoader
from flexmoe.memory import MostHeld, held, text
from flexmoe.progress import Track, silent
from flexmoe.resume import Work
from flexmoe.statistics import Statistics, find_statistics
from flexmoe.streaming import Pass, observe_streamed
from flexmoe.training import CHUNK

COPIES = 6  # of the logits in float32, the gradient and what the loss makes of them among these


def check_weights(loader: LayerLoader, memory: int) -> None:
    """`FlexmoeError` if ``memory`` bytes cannot hold what is in memory at any time: known from
    config.json, before a weight is read."""
    now, outside, layer = held(loader.device), loader.bytes_outside, max(loader.bytes_of)
    if (needed := now + outside + layer) > memory:
        raise FlexmoeError(
            f"{text(memory)} of memory are too little: {text(now)} are held already, embeddings and "
            f"head take {text(outside)}, the largest decoder layer {text(layer)} "
            f"({str(loader.dtype).removeprefix('torch.')}). Give --memory more than {text(needed)}"
        )


def observe_within(
    loader: LayerLoader,
    ids: Tensor,
    names: Sequence[str],
    work: Work,
    memory: int,
    *,
    batch_size: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> Statistics:
    """`observe_streamed` with as many windows of a batch, and tokens at the head, at a time as fit
    into ``memory`` bytes. Raises `FlexmoeError` if one window does not fit, or the disk is too
    small for the activations."""
    saved = work.stage("sizes")
    if (state := saved.load()) is None:  # measured once: other sizes would round otherwise
        sizes = _sizes(loader, ids, names, work, memory, batch_size)
        state = 0, {name: torch.tensor(value) for name, value in sizes.items()}
        saved.save(*state)
    return observe_streamed(
        loader,
        ids,
        names,
        work,
        batch_size=batch_size,
        seed=seed,
        track=track,
        **{name: int(value) for name, value in state[1].items()},
    )


def _sizes(
    loader: LayerLoader, ids: Tensor, names: Sequence[str], work: Work, memory: int, batch_size: int
) -> dict[str, int]:
    base, first = held(loader.device), min(loader.experts)
    larger = max(loader.bytes_of) - loader.bytes_of[first]  # than the layer that is measured
    files = Activations(work.path / "rehearsal", loader.device)
    wanted = find_statistics(names)

    def most(windows: int) -> int:
        part = Pass(loader, ids[:windows], wanted, files, windows, windows, CHUNK)
        with MostHeld(loader.device) as seen:
            part.rehearse(first)
        return seen.bytes + larger

    try:
        windows, peak = 1, most(1)
        _check_disk(files, len(ids), len(loader.layers))
        if peak > memory:
            raise FlexmoeError(
                f"{text(memory)} of memory are too little for one window of {ids.shape[1]} tokens: "
                f"it takes {text(peak)}. Give --memory more than that, or a shorter --seq-len"
            )
        each = peak - base - max(loader.bytes_of)
        while 2 * windows <= min(batch_size, len(ids)) and peak + windows * each <= memory:
            before, peak = peak, most(2 * windows)
            if peak > memory:
                break
            each, windows = max(0, peak - before) // windows, 2 * windows
    finally:
        shutil.rmtree(files.path, ignore_errors=True)
    vocabulary = loader.model.config.get_text_config().vocab_size
    tokens = (memory - held(loader.device)) // (COPIES * 4 * vocabulary)
    return {"micro_batch": windows, "chunk": max(1, min(CHUNK, tokens))}


def _check_disk(files: Activations, windows: int, layers: int) -> None:
    """`FlexmoeError` if the outputs of all layers for all windows do not fit beside what is made."""
    of_one = sum(file.stat().st_size for file in files.path.glob("output-0/*"))
    needed, free = of_one * windows * (layers + 1), shutil.disk_usage(files.path).free
    if needed > free:
        raise FlexmoeError(
            f"the activations of {windows} windows need {text(needed)} of disk, '{files.path}' has "
            f"{text(free)} free: use fewer --samples, a shorter --seq-len, or --out on another disk"
        )
