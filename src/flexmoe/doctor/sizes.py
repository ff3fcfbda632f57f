"""What jobs take that follows from sizes alone: bytes of weights, of what stays beside them, of
files.

Nothing here needs torch: `glance` tells it at once, and `estimates` adds activations and time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from flexmoe.doctor.found import Need
from flexmoe.headers import TensorInfo

if TYPE_CHECKING:
    from flexmoe.experts import ExpertLayer
    from flexmoe.trace import TracedLayer

VECTORS = 12  # float64 vectors over all channels that learning holds at a time
FULL_STATE = 16  # bytes a trained parameter: the original, a gradient, two moments
EXPORTED = 0.4  # the member whose exports are looked at
TRACED = 192  # bytes a channel for a moment, while `trace` finds where channels are


class Experts(NamedTuple):
    """The routed experts of one layer: ``parameters`` of one channel."""

    E: int
    I: int
    H: int
    channel: int


@dataclass(frozen=True)
class Sizes:
    """``tensors``: those of the checkpoint. ``stored``: by layer the tensors of its experts, and
    whether each of them holds all experts. ``total``: parameters of the model, ``routed``: those
    of its routed experts, which are ``gated`` or not."""

    tensors: Mapping[str, TensorInfo]
    stored: Mapping[int, Mapping[str, bool]]
    layers: Sequence[Experts]
    total: int
    routed: int
    gated: bool

    @classmethod
    def of(
        cls, tensors: Mapping[str, TensorInfo], traced: Mapping[int, TracedLayer], total: int
    ) -> Sizes:
        """Of a checkpoint whose experts were traced and whose model has ``total`` parameters."""
        layers: list[ExpertLayer] = [found.layer for found in traced.values()]
        return cls(
            tensors,
            {i: {p.name: p.expert is None for p in t.stored} for i, t in traced.items()},
            [Experts(x.E, x.I, x.H, x.shape.channel_parameters) for x in layers],
            total,
            sum(layer.shape.parameters for layer in layers),
            "has_gate" in layers[0].flags,
        )

    @cached_property
    def bytes(self) -> int:
        """Of all tensors of the checkpoint."""
        return sum(info.bytes for info in self.tensors.values())

    @cached_property
    def whole(self) -> dict[str, bool]:
        """Of each tensor of experts, whether it holds all experts of its layer."""
        return {name: fused for names in self.stored.values() for name, fused in names.items()}

    @cached_property
    def apart(self) -> int:
        """Bytes of the tensors of single experts."""
        return sum(self.tensors[name].bytes for name, fused in self.whole.items() if not fused)

    @cached_property
    def other(self) -> int:
        """Bytes of the largest tensor that is none of experts."""
        others = (info.bytes for name, info in self.tensors.items() if name not in self.whole)
        return max(others, default=0)

    @cached_property
    def largest(self) -> dict[bool, int]:
        """Bytes of the largest tensor of a single expert (False) and of all experts (True)."""
        found = {False: 0, True: 0}
        for name, fused in self.whole.items():
            found[fused] = max(found[fused], self.tensors[name].bytes)
        return found

    @cached_property
    def layer(self) -> int:
        """Bytes of the experts of the largest layer."""
        return max(
            sum(self.tensors[name].bytes for name in names) for names in self.stored.values()
        )

    @cached_property
    def itemsize(self) -> int:
        """Bytes of a stored parameter of the experts."""
        info = self.tensors[next(iter(next(iter(self.stored.values()))))]
        return info.bytes // max(1, math.prod(info.shape))

    @property
    def channels(self) -> int:
        return sum(layer.E * layer.I for layer in self.layers)

    def held(self, need: Need, itemsize: int, cpu: bool, activations: int | None = None) -> Need:
        """``need`` with what else is held at its peak, or while weights of ``itemsize`` are read.
        On the CPU files are mapped meanwhile. Where nothing is cast most weights are the mapped
        file, and with it stays what experts that the model holds as one tensor were copied from."""
        parts, loading = dict(need.parts), itemsize * self.total
        if cpu and itemsize == self.itemsize:
            if self.apart:
                parts["mapped files"] = self.apart
        elif cpu:
            loading += self.bytes
        if activations is not None:
            parts["activations"] = activations
        if cpu:  # an expert parameter is built from its parts
            sides = 2 if self.gated else 1
            loading += itemsize * sides * max(layer.E * layer.I * layer.H for layer in self.layers)
        working = sum(parts.values())
        if loading > working:
            parts = {"weights": parts["weights"], "reading them": loading - parts["weights"]}
        return replace(need, memory=max(loading, working), parts=parts)

    # --- parts of the memory, by what they are ------------------------------------------------

    def compress(self, itemsize: int, statistics: int, masks: bool, learned: bool) -> Need:
        """``statistics`` a channel; ``masks``: some are learned; by ``learned``, the positions."""
        parts = {
            "weights": itemsize * self.total,
            "statistics": 8 * self.channels * (statistics + 1 + masks * VECTORS),
        }
        scratch = 8 * self.channels if learned else 0
        return Need("compress", sum(parts.values()), parts, self.bytes, scratch)

    def moments(self, free: int) -> tuple[int, int]:
        """Bytes of the moments that `refit` holds at once where so many are free, and how many
        passes that takes."""
        of_layer = [4 * layer.E * layer.I**2 for layer in self.layers]
        held = max(max(of_layer), min(sum(of_layer), max(0, free - 4 * self.total) // 2))
        return held, math.ceil(sum(of_layer) / max(1, held))

    def closed_form(self, free: int) -> Need:
        """Where so many bytes of memory are free."""
        parts = {"weights": 4 * self.total, "moments": self.moments(free)[0]}
        return Need("recover --mode closed-form", sum(parts.values()), parts, self.bytes)

    def trained(self, mode: str, parameters: int) -> Need:
        """Of a mode that trains so many parameters by gradients."""
        parts = {"weights": 4 * self.total}
        if mode == "lora":  # the weights with the adapter, which the backward pass keeps
            parts["adapted weights"] = 4 * self.routed
        parts["training state"] = (12 if mode == "lora" else FULL_STATE) * parameters
        state = 2 * 12 * parameters  # parameters and moments, two files in turn
        return Need(f"recover --mode {mode}", sum(parts.values()), parts, self.bytes, state)

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA on all experts."""
        sides = 2 if self.gated else 1
        rows = (layer.E * ((sides + 1) * layer.I + 2 * layer.H) for layer in self.layers)
        return rank * sum(rows)

    # --- exports ------------------------------------------------------------------------------

    def export_bytes(self, width: int) -> dict[str, int]:
        """Bytes of the tensors of each layout at `EXPORTED`, with experts of ``width`` in a
        uniform one: exact, but for a ragged export, which has its plan's widths."""
        removed = sum(layer.E * (layer.I - width) * layer.channel for layer in self.layers)
        return {
            "uniform": self.bytes - self.itemsize * removed,
            "masked": self.bytes,
            "ragged": self.bytes - round(self.itemsize * EXPORTED * self.routed),
        }

    def export(self, layout: str, size: int) -> Need:
        """An export of ``size`` bytes. It goes tensor by tensor: the most that is held are two
        copies of a tensor without channels, a tensor with all experts and one of them, or one
        expert of either side in float32; or, before, the numbers of the trace."""
        E, I, *_ = max(self.layers, key=lambda layer: (layer.E, layer.I))
        rebuilt = 0
        for fused, size_of in self.largest.items():
            row, whole = size_of // (E if fused else 1), 0 if layout == "ragged" else size_of
            rebuilt = max(rebuilt, 2 * row + whole)
        expert = self.layer // E
        parts = {
            "two copies of the largest tensor": 2 * self.other,
            "a tensor of experts": rebuilt,
            "an expert, read and written": 2 * expert + 4 * expert // self.itemsize,
            "the trace": TRACED * E * I,
        }
        largest = max(parts, key=lambda name: parts[name])
        return Need(f"export --layout {layout}", parts[largest], {largest: parts[largest]}, size)
