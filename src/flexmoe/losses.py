"""Losses of text windows, one by one, and what they come to at every budget."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.intervals import interval, resampled_means
from flexmoe.progress import Track, silent

Losses = Mapping[float, Mapping[str, Tensor]]


def window_losses(
    model: nn.Module,
    windows: Mapping[str, Tensor],
    budgets: Sequence[float],
    switch: Callable[[float], object],
    *,
    batch_size: int = 8,
    track: Track = silent,
) -> dict[float, dict[str, Tensor]]:
    """Loss of every window, float64 [n] nats a predicted token, by budget and data file.

    ``windows`` are tokens [n, t] by file; ``switch(pruned)`` makes ``model`` compute a budget and
    is called once for each.
    """
    budgets = list(dict.fromkeys(budgets))
    found: dict[float, dict[str, list[Tensor]]] = {
        b: {name: [] for name in windows} for b in budgets
    }
    work = [
        (pruned, name, batch)
        for pruned in budgets
        for name, ids in windows.items()
        for batch in ids.split(batch_size)
    ]
    device, now = next(model.parameters()).device, None
    for pruned, name, batch in track(work, "evaluate"):
        if pruned != now:
            switch(pruned)
            now = pruned
        found[pruned][name].append(_losses(model, batch.to(device)))
    return {b: {name: torch.cat(parts) for name, parts in of.items()} for b, of in found.items()}


def _losses(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    loss = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    return loss.view(len(ids), -1).cpu().double().mean(1)


def loss_rows(losses: Losses, base: float = 0.0, *, seed: int = 0) -> dict[float, dict[str, Any]]:
    """What `window_losses` come to, by budget.

    ``nll``: nats a token, the mean over data files, each counting the same; ``files``: of each.
    Where the budget ``base`` is among them, also ``increase`` of the loss over it, ``kept`` =
    exp(-increase), the share of the likelihood a token that is kept (perplexity of the base /
    perplexity), and the paired 95 % intervals of both, over windows drawn within each file; an
    interval is None where a file has one window only.
    """
    budgets = list(losses)
    names = list(losses[budgets[0]])
    files = [np.stack([losses[b][name].numpy() for b in budgets], 1) for name in names]
    nll_FB = np.stack([loss_NB.mean(0) for loss_NB in files])
    nll_B = nll_FB.mean(0)
    means_RB = resampled_means(files, [1 / len(names)] * len(names), seed=seed)
    rows: dict[float, dict[str, Any]] = {}
    for b, pruned in enumerate(budgets):
        of_file = dict(zip(names, nll_FB[:, b].tolist(), strict=True))
        rows[pruned] = {"nll": float(nll_B[b]), "files": of_file}
        if base in losses:
            whole = budgets.index(base)
            increase = float(nll_B[b] - nll_B[whole])
            spread = interval(means_RB[:, b] - means_RB[:, whole])
            rows[pruned] |= {
                "increase": increase,
                "increase_interval": spread,
                "kept": math.exp(-increase),
                "kept_interval": spread and (math.exp(-spread[1]), math.exp(-spread[0])),
            }
    return rows
