"""Pattern: what one task needs of a model's experts, and its two small files."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict
from safetensors.torch import load, save
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.files import read_sealed, seal, write_whole
from flexmoe.plan import LayerRecord, Recipe

FORMAT = 1


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Reach(_Record):
    """How far from its task's signature text of the task lies: of ``prompts`` held-out prompts of
    ``tokens`` tokens no more than one in twenty is further away than ``distance``."""

    tokens: int
    prompts: int
    distance: float


class PatternRecord(_Record):
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
    calibration tokens, and its ``reach`` by the length of the prompt, rising."""

    task: str
    score: dict[int, Tensor]
    signature_E: Tensor
    reach: tuple[Reach, ...]
    recipe: Recipe
    layers: dict[int, LayerRecord]
    bytes_full: int
    bytes_per_parameter: int

    def reach_at(self, tokens: int) -> float:
        """How far a prompt of so many tokens may lie from the signature: between the lengths that
        were measured on a line over the logarithm of the length, beyond them as at the nearest."""
        lengths = [math.log(reach.tokens) for reach in self.reach]
        return float(np.interp(math.log(tokens), lengths, [r.distance for r in self.reach]))

    def save(self, store: Path) -> None:
        """Write ``TASK.safetensors`` and ``TASK.json`` into the existing folder ``store``."""
        tensors = {f"layers.{i}.score": score.contiguous() for i, score in self.score.items()}
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
        text = json.dumps(seal(record.model_dump()), indent=1) + "\n"
        write_whole(store / f"{self.task}.json", text.encode())

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
            recipe=record.recipe,
            layers=record.layers,
            bytes_full=record.bytes_full,
            bytes_per_parameter=record.bytes_per_parameter,
        )
