"""The same beginnings continued by several budgets, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from flexmoe.checkpoint import meta_model
from flexmoe.data import check_tokens, evaluation_windows, load_tokenizer
from flexmoe.errors import FlexmoeError
from flexmoe.family import load, pick_device, set_budget
from flexmoe.progress import Track, silent

PROMPT, NEW = 32, 48  # tokens shown to the model, and tokens it writes


@dataclass(frozen=True)
class Sample:
    """Text of a data file: its beginning, how it goes on there, and how each budget goes on."""

    file: str
    prompt: str
    original: str
    continued: dict[float, str]


def make_samples(
    family: str | Path,
    weights: str | Path,
    data: str,
    budgets: Sequence[float],
    number: int,
    *,
    base: str | Path | None = None,
    device: str = "auto",
    track: Track = silent,
) -> list[Sample]:
    """``number`` beginnings of held-out text, files in turn, continued greedily at each budget.

    Plain greedy decoding hides nothing: a model that loops does so here. ``weights`` is the folder
    of the tokenizer, ``base`` the weights of a plan alone (see `flexmoe.load`).
    """
    if number < 1:
        raise FlexmoeError(f"samples must be at least 1, found {number}")
    settings = meta_model(weights).config
    tokenizer = load_tokenizer(Path(weights), settings)
    windows = evaluation_windows(data, tokenizer, samples=number, seq_len=PROMPT + NEW)
    chosen = [  # the first window of each file, then the second ...
        (file, check_tokens(ids[at], settings))
        for at in range(number)
        for file, ids in windows.items()
        if at < len(ids)
    ][:number]
    if len(chosen) < number:
        raise FlexmoeError(
            f"the text has {len(chosen)} windows of {PROMPT + NEW} tokens, {number} samples are "
            "asked for: lower --samples"
        )
    dtype = torch.float32 if pick_device(device).type == "cpu" else "auto"
    model = load(family, base=base, device=device, dtype=dtype)
    read = partial(tokenizer.decode, skip_special_tokens=True)
    continued: list[dict[float, str]] = [{} for _ in chosen]
    work = [(pruned, n) for pruned in budgets for n in range(number)]
    for pruned, n in track(work, "generate"):
        if n == 0:
            set_budget(model, pruned)
        ids = chosen[n][1][None, :PROMPT].to(model.device)
        mask = torch.ones_like(ids)
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
        continued[n][pruned] = read(out[0, PROMPT:])
    return [
        Sample(file, read(ids[:PROMPT]), read(ids[PROMPT:]), texts)
        for (file, ids), texts in zip(chosen, continued, strict=True)
    ]
