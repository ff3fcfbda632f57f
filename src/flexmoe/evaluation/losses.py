"""Text windows, one by one, and what they come to for every member: loss, and distance to a base.

Two numbers say how far a member is from its base where the loss alone could hide it: the
Kullback-Leibler divergence of its next-token distribution from the base's, and how often both
have the same most likely token (as "Accuracy is not all you need", Dutta et al., 2024, arXiv
2407.09141, measures compression).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flexmoe.evaluation.intervals import Array, interval, resampled_means
from flexmoe.evaluation.members import Key, Members, device_of
from flexmoe.progress import Track, silent

# What is known of a window, the mean over its predicted tokens: loss in nats; divergence of the
# member from the base in nats; whether the base's most likely token is also the member's. The
# last two are NaN without a base. Letter M.
MEASURES = ("nll", "kl", "agreement")
# What a row says of a member beside a base, each with an interval.
DISTANCES = ("increase", "kept", "kl", "agreement")
CHUNK = 2**25  # float32 logits worked on at a time, 128 MiB

Losses = Mapping[Key, Mapping[str, Tensor]]


class Teacher(Protocol):
    """Where the base's logits of a batch wait for the other members."""

    def put(self, number: int, logits_TV: Tensor) -> None: ...

    def get(self, number: int) -> Tensor: ...


class InMemory:
    """The logits of the latest batch."""

    def put(self, number: int, logits_TV: Tensor) -> None:
        """Keep them, and those alone."""
        self.logits_TV = logits_TV

    def get(self, number: int) -> Tensor:
        """Those of the latest batch."""
        return self.logits_TV


class InFiles:
    """The logits of all batches, a file each in ``folder``."""

    def __init__(self, folder: Path):
        self.folder = folder

    def put(self, number: int, logits_TV: Tensor) -> None:
        """Write those of one batch."""
        save_file({"logits": logits_TV.cpu().contiguous()}, self.folder / f"{number}.safetensors")

    def get(self, number: int) -> Tensor:
        """Read those of one batch."""
        return load_file(self.folder / f"{number}.safetensors")["logits"]


def window_losses(
    members: Members,
    windows: Mapping[str, Tensor],
    base: Key | None = None,
    *,
    batch_size: int = 8,
    folder: Path | None = None,
    track: Track = silent,
) -> dict[Key, dict[str, Tensor]]:
    """`MEASURES` of every window, float64 [n, M] on the CPU, by member and data file.

    ``windows`` are tokens [n, t] by file. Batch by batch, ``base`` first and then the others, so
    that the logits of one batch are all that is kept; with ``folder``, for models that do not fit
    in memory together, member by member, and the base's logits of all batches lie there.
    """
    keys = sorted(members, key=lambda key: key != base)
    work = [(name, batch) for name, ids in windows.items() for batch in ids.split(batch_size)]
    numbers = list(range(len(work)))
    groups = [[number] for number in numbers] if folder is None else [numbers]
    teacher: Teacher = InMemory() if folder is None else InFiles(folder)
    found: dict[Key, dict[str, list[Tensor]]] = {k: {name: [] for name in windows} for k in members}
    now: Key | None = None
    model: Any = None
    steps = [(key, number) for group in groups for key in keys for number in group]
    for key, number in track(steps, "evaluate"):
        if key != now:
            model = None  # or it could not go before the next one comes
            model, now = members[key](), key
        name, ids = work[number]
        logits_TV = _logits(model, ids)
        if base is not None and key == base:
            teacher.put(number, logits_TV)
        known = None if base is None else logits_TV if key == base else teacher.get(number)
        measured_TM = _measured(logits_TV, ids[:, 1:].flatten(), known)
        found[key][name].append(measured_TM.view(len(ids), -1, len(MEASURES)).mean(1))
    return {k: {name: torch.cat(parts) for name, parts in of.items()} for k, of in found.items()}


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of the predicted tokens [T, V], in the model's dtype."""
    device = device_of(model)
    with torch.no_grad():
        logits = model(input_ids=ids.to(device), use_cache=False).logits
    return logits[:, :-1].flatten(0, 1)


def _measured(logits_TV: Tensor, target_T: Tensor, base_TV: Tensor | None) -> Tensor:
    """`MEASURES` of every token, float64 [T, M] on the CPU."""
    step = max(1, CHUNK // logits_TV.shape[1])
    parts = []
    for start in range(0, len(target_T), step):
        at = slice(start, start + step)
        log_p_TV = logits_TV[at].float().log_softmax(-1)
        nll_T = -log_p_TV.gather(1, target_T[at, None].to(log_p_TV.device))[:, 0]
        kl_T = agreement_T = torch.full_like(nll_T, math.nan)
        if base_TV is not None:
            base_log_p_TV = base_TV[at].to(log_p_TV.device).float().log_softmax(-1)
            kl_T = (base_log_p_TV.exp() * (base_log_p_TV - log_p_TV)).sum(1)
            agreement_T = (base_log_p_TV.argmax(1) == log_p_TV.argmax(1)).to(nll_T)
        parts.append(torch.stack([nll_T, kl_T, agreement_T], 1).cpu().double())
    return torch.cat(parts)


def loss_rows(losses: Losses, base: Key | None = 0.0) -> dict[Key, dict[str, Any]]:
    """What `window_losses` come to, by member.

    ``nll``: nats a token, the mean over data files, each counting the same; ``files``: of each;
    ``by_file``: all that follows of each. Where ``base`` is among the members, also ``increase``
    of the loss over it, ``kept`` = exp(-increase), the share of the likelihood a token that is
    kept (perplexity of the base / perplexity), ``kl`` and ``agreement`` with the base; each with
    a 95 % interval over windows drawn within each file, by the same draws for all members
    (paired); None where a file has one window only.
    """
    keys, names = list(losses), list(next(iter(losses.values())))
    whole = keys.index(base) if base is not None and base in losses else None
    files_NBM = [np.stack([losses[k][name].numpy() for k in keys], 1) for name in names]
    drawn = [_drawn(file_NBM, (0, f)) for f, file_NBM in enumerate(files_NBM)]
    of_file = [
        _rows(file_NBM.mean(0), drawn_RBM, whole)
        for file_NBM, drawn_RBM in zip(files_NBM, drawn, strict=True)
    ]
    mean_BM = np.mean([file_NBM.mean(0) for file_NBM in files_NBM], 0)
    of_all = _rows(mean_BM, np.mean(drawn, 0), whole)
    rows = {}
    for b, key in enumerate(keys):
        by_file = {name: of_file[f][b] for f, name in enumerate(names)}
        files = {name: row["nll"] for name, row in by_file.items()}
        rows[key] = {**of_all[b], "files": files, "by_file": by_file}
    return rows


def _drawn(file_NBM: Array, seed: tuple[int, int]) -> Array:
    """Resampled means [R, B, M] of one file."""
    _, B, M = file_NBM.shape
    return resampled_means([file_NBM.reshape(-1, B * M)], seed=seed).reshape(-1, B, M)


def _rows(mean_BM: Array, drawn_RBM: Array, base: int | None) -> list[dict[str, Any]]:
    rows = []
    for b, (nll, kl, agreement) in enumerate(mean_BM.tolist()):
        nll_R, kl_R, agreement_R = drawn_RBM[:, b].T
        row: dict[str, Any] = {"nll": nll, "nll_interval": interval(nll_R)}
        if base is not None:
            increase = nll - float(mean_BM[base, 0])
            spread = interval(nll_R - drawn_RBM[:, base, 0])
            row |= {
                "increase": increase,
                "increase_interval": spread,
                "kept": math.exp(-increase),
                "kept_interval": spread and (math.exp(-spread[1]), math.exp(-spread[0])),
                "kl": kl,
                "kl_interval": interval(kl_R),
                "agreement": agreement,
                "agreement_interval": interval(agreement_R),
            }
        rows.append(row)
    return rows
