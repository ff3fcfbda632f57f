"""Training tokens: text files to one stream of tokens per domain, and windows drawn from them."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flexmoe.sources import TINY, Source, documents

TOKENIZER = TINY / "model"
SUFFIX = ".train.jsonl.gz"


def training_tokens(corpus: Path, tokenizer: Any, work: Path) -> dict[str, np.ndarray]:
    """All ``DOMAIN.train.jsonl.gz`` of ``corpus`` as tokens, by domain. They are made once and
    kept in ``work`` under a hash of texts and tokenizer, so that no other corpus is taken for
    this one."""
    files = sorted(corpus.glob(f"*{SUFFIX}"))
    if not files:
        raise SystemExit(f"no file *{SUFFIX} in {corpus}")
    streams = {}
    for file in files:
        content = file.read_bytes() + (TOKENIZER / "tokenizer.json").read_bytes()
        domain = file.name.removesuffix(SUFFIX)
        kept = work / "tokens" / f"{domain}-{hashlib.sha256(content).hexdigest()[:12]}.npy"
        if not kept.exists():
            _write(kept, _tokenize(file, tokenizer))
        streams[domain] = np.load(kept, mmap_mode="r")
        print(f"{domain}: {len(streams[domain]):,} tokens", flush=True)
    return streams


def _tokenize(file: Path, tokenizer: Any) -> np.ndarray:
    """Documents joined, the begin token before each."""
    parts: list[np.ndarray] = []
    for text in documents(Source(str(file))):
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(np.array([tokenizer.bos_token_id, *ids], dtype=np.uint16))
    return np.concatenate(parts)


def _write(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}")
    with beside.open("wb") as file:
        np.save(file, array)
    os.replace(beside, path)


def draw(
    streams: dict[str, np.ndarray], count: int, window: int, power: float, seed: int, step: int
) -> Tensor:
    """``count`` windows [count, window] for one step, int64. They depend on seed and step alone,
    so a training that goes on after a break sees what it would have seen."""
    rng = np.random.default_rng((seed, step))
    names = list(streams)
    weights = np.array([float(len(streams[name])) for name in names]) ** power
    picks = rng.choice(len(names), size=count, p=weights / weights.sum())
    rows = []
    for pick in picks:
        stream = streams[names[pick]]
        start = int(rng.integers(len(stream) - window + 1))
        rows.append(np.asarray(stream[start : start + window], dtype=np.int64))
    return torch.from_numpy(np.stack(rows))
