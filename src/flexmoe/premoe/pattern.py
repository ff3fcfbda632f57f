"""Pattern: what one task needs of a model's experts, and its two small files."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.files import Strict, read_sealed, write_sealed, write_whole
from flexmoe.plan import LayerRecord, Recipe
from flexmoe.premoe.nearness import distances

FORMAT = 2


class Reach(Strict):
    """How far from its task's signature text of the task lies: of ``prompts`` held-out prompts of
    ``tokens`` tokens no more than one in twenty is further away than ``distance``."""

    tokens: int
    prompts: int
    distance: float


class PatternRecord(Strict):
    """``TASK.json`` in a store; ``recipe`` says how it was made and of which weights, ``layers``
    counts of every MoE layer, ``bytes_full`` the size of the model's tensors."""

    format: int
    task: str
    recipe: Recipe
    layers: dict[int, LayerRecord]
    reach: list[Reach]
    bytes_full: int
    bytes_per_parameter: int
    tensors_sha256: str


@dataclass(frozen=True)
class Pattern:
    """What ``task`` needs: ``score`` [E] of every MoE layer, higher = needed more; and how to know
    its text again: ``signature_E``, the mean logits of the first MoE layer's router over the
    calibration tokens, its ``reach`` by the length of the prompt, rising, and how prompts of each
    length ``spread`` [E, E] around it (see `nearness`)."""

    task: str
    score: dict[int, Tensor]
    signature_E: Tensor
    reach: tuple[Reach, ...]
    spread: dict[int, Tensor]
    recipe: Recipe
    layers: dict[int, LayerRecord]
    bytes_full: int
    bytes_per_parameter: int

    def distance(self, signature_E: Tensor, tokens: int) -> float:
        """How far a prompt of so many tokens with this signature lies from the task, in deviations
        of the task's own prompts of that length."""
        between_NEE = torch.stack([self.spread[reach.tokens] for reach in self.reach])
        spread_EE = torch.einsum("n,nef->ef", self._shares(tokens).to(between_NEE), between_NEE)
        return float(distances(signature_E[None], self.signature_E, spread_EE)[0])

    def reach_at(self, tokens: int) -> float:
        """How far from the task a prompt of so many tokens may lie."""
        distance_N = torch.tensor([r.distance for r in self.reach], dtype=torch.float64)
        return float(self._shares(tokens) @ distance_N)

    def _shares(self, tokens: int) -> Tensor:
        """How much each length that was measured counts for so many tokens: between two of them by
        the logarithm of the length, beyond them the nearest alone."""
        lengths, at = [math.log(reach.tokens) for reach in self.reach], math.log(tokens)
        shares = [np.interp(at, lengths, one) for one in np.eye(len(lengths))]
        return torch.tensor(shares, dtype=torch.float64)

    def save(self, store: Path) -> None:
        """Write ``TASK.safetensors`` and ``TASK.json`` into the existing folder ``store``."""
        tensors = {f"layers.{i}.score": score.contiguous() for i, score in self.score.items()}
        tensors |= {f"spread.{n}": spread.contiguous() for n, spread in self.spread.items()}
        content = save(tensors | {"signature": self.signature_E.contiguous()})
        record = PatternRecord(
            format=FORMAT,
            task=self.task,
            recipe=self.recipe,
            layers=self.layers,
            reach=list(self.reach),
            bytes_full=self.bytes_full,
            bytes_per_parameter=self.bytes_per_parameter,
            tensors_sha256=hashlib.sha256(content).hexdigest(),
        )
        write_whole(store / f"{self.task}.safetensors", content)
        write_sealed(store / f"{self.task}.json", record)

    @classmethod
    def load(cls, store: Path, task: str) -> Pattern:
        """Read and check the two files; a `FlexmoeError` says what is wrong with them."""
        again = f"remove the files of '{task}' and profile it again"
        record = read_sealed(store / f"{task}.json", PatternRecord, FORMAT, again)
        if record.task != task:
            raise FlexmoeError(f"{store / task}.json is the pattern of '{record.task}': {again}")
        path = store / f"{task}.safetensors"
        if not path.is_file():
            raise FlexmoeError(f"{path} is missing: {again}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != record.tensors_sha256:
            raise FlexmoeError(f"{path} is damaged: its sha256 does not fit, {again}")
        tensors = load(content)
        return cls(
            task=record.task,
            score={i: tensors[f"layers.{i}.score"] for i in record.layers},
            signature_E=tensors["signature"],
            reach=tuple(record.reach),
            spread={reach.tokens: tensors[f"spread.{reach.tokens}"] for reach in record.reach},
            recipe=record.recipe,
            layers=record.layers,
            bytes_full=record.bytes_full,
            bytes_per_parameter=record.bytes_per_parameter,
        )
