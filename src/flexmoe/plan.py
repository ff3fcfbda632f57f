"""Plan: the order of the channels of every expert and the widths of every budget, and its files.

A plan is all that the rest of flexmoe reads: ranking, masking, exporting and serving follow from
it. On disk it is two small files, ``flexmoe.json`` and ``flexmoe.safetensors``; beside a ranked
checkpoint they make a *family*, alone they apply to the untouched base model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save
from torch import Tensor

from flexmoe.allocate import cut_between
from flexmoe.errors import FlexmoeError
from flexmoe.experts import LayerShape
from flexmoe.files import Strict, read_sealed, write_sealed, write_whole

FORMAT = 1
JSON_NAME, TENSORS_NAME = "flexmoe.json", "flexmoe.safetensors"


class LayerRecord(Strict):
    """Counts of one MoE layer (see `LayerShape`) and how many experts a token is sent to."""

    experts: int
    channels: int
    hidden: int
    channel_parameters: int
    fixed_parameters: int
    experts_per_token: int

    @property
    def shape(self) -> LayerShape:
        fields = self.model_dump(exclude={"experts_per_token"})
        return LayerShape(**fields)


class Member(Strict):
    """Figures of one budget. ``pruned`` is what was asked for, ``achieved`` what the widths give;
    ``bytes`` is the size of a ragged export's tensors, ``active_parameters`` counts routed
    parameters a token meets when every expert is as likely as the next."""

    pruned: float
    achieved: float
    routed_parameters: int
    active_parameters: int
    bytes: int


class Recipe(Strict):
    """How a plan was made: what it takes to make it again."""

    base_model: str
    model_type: str
    revision: str | None = None  # commit on the hub
    weights_sha256: str = ""  # of the very weights, see trace.fingerprint; "" where unknown
    method: str
    allocate: str
    unit: str = "channel"  # what stays or goes: channels, or whole experts
    router: str = "keep"  # what becomes of it where whole experts go, see `routing.rules`
    router_groups: int = 1  # of experts, which all lose equally many
    settings: dict[str, float | int | str] = Field(default_factory=dict)
    data: str
    data_sha256: str
    samples: int
    seq_len: int
    seed: int
    # by layer: saw too few tokens, their order is a guess
    thin_experts: dict[int, list[int]] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: str = ""
    options: dict[str, Any] | None = None  # what was asked of compress beside its defaults
    # what was done to the weights since
    recovery: list[dict[str, Any]] = Field(default_factory=list)


class Manifest(Strict):
    """``flexmoe.json``. ``ranked`` says whether the weights in the same folder are in the plan's
    order already (a family); false for a plan alone."""

    format: int
    ranked: bool
    quantum: int
    recipe: Recipe
    layers: dict[int, LayerRecord]
    budgets: list[Member]
    bytes_per_parameter: int
    tensors_sha256: str


@dataclass(frozen=True)
class Plan:
    """Order and widths of every MoE layer.

    ``layers[i]`` counts of decoder layer i; ``order[i]`` int32 [E, I], the original index of the
    channel at each rank, best first; ``width[i]`` int32 [B, E], channels kept; ``budgets`` the B
    pruned shares, rising from 0.0. Widths never grow with the budget, so every member keeps a
    prefix of the one order. ``constant[i]`` float32 [E, H], where the router rule is ``constant``:
    what an expert that is gone adds instead.
    """

    layers: dict[int, LayerRecord]
    order: dict[int, Tensor]
    width: dict[int, Tensor]
    budgets: tuple[float, ...]
    quantum: int
    recipe: Recipe
    bytes_full: int
    bytes_per_parameter: int
    constant: dict[int, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.check()

    # --- figures -------------------------------------------------------------------------------

    @property
    def routed_parameters(self) -> int:
        """Routed-expert parameters at full width."""
        return sum(layer.shape.parameters for layer in self.layers.values())

    def member(self, pruned: float) -> Member:
        """The figures of the member at ``pruned`` (any share the plan reaches)."""
        return self.figures(pruned, self.widths(pruned))

    def figures(
        self, pruned: float, width: Mapping[int, Tensor], router: str | None = None
    ) -> Member:
        """The figures of widths [E] of every layer that were asked for as ``pruned``, under the
        plan's router rule or another one."""
        routed, active, rule = 0, 0.0, router or self.recipe.router
        for i, layer in self.layers.items():
            among = layer.experts
            if rule == "remove":  # of those gone nothing is left
                among = int((width[i] > 0).sum())
            here = int(width[i].sum()) * layer.channel_parameters
            here += among * layer.fixed_parameters
            routed += here
            active += here * min(layer.experts_per_token, among) / max(among, 1)
        removed = self.routed_parameters - routed
        size = self.bytes_full - removed * self.bytes_per_parameter
        if rule == "constant" and removed:
            size += sum(constant.nbytes for constant in self.constant.values())
        return Member(
            pruned=pruned,
            achieved=removed / self.routed_parameters,
            routed_parameters=routed,
            active_parameters=round(active),
            bytes=size,
        )

    def widths(self, pruned: float) -> dict[int, Tensor]:
        """Widths [E] of every layer at ``pruned``. Between two budgets of the plan the cut runs
        from the richer to the poorer one, exact to one quantum and nested like the rest."""
        if any(abs(pruned - b) < 1e-9 for b in self.budgets):
            at = min(range(len(self.budgets)), key=lambda b: abs(self.budgets[b] - pruned))
            return {i: width[at] for i, width in self.width.items()}
        if not 0.0 <= pruned <= self.budgets[-1]:  # also what is not a number
            last = self.budgets[-1]
            fix = f"the nearest is {0.0 if pruned < 0 else last:g}"
            if 1 < pruned <= 100 * last:
                fix = f"{pruned:g} % is {pruned / 100:g}"
            raise FlexmoeError(
                f"pruned {pruned:g} is outside this plan, which reaches from 0 to {last:g}; {fix}"
            )
        if self.recipe.unit == "expert":
            known = ", ".join(f"{share:g}" for share in self.budgets)
            raise FlexmoeError(
                f"this plan removes whole experts and knows those of its budgets only ({known}): "
                f"compress again with --pruned {pruned:g}"
            )
        poorer = next(b for b, share in enumerate(self.budgets) if share > pruned)
        return cut_between(self, poorer - 1, poorer, pruned)

    # --- checks --------------------------------------------------------------------------------

    def check(self) -> None:
        """Shapes, permutations, nesting, exact budgets; a `FlexmoeError` names what is wrong."""
        B = len(self.budgets)
        if (
            not B
            or self.budgets[0] != 0.0
            or any(a >= b for a, b in zip(self.budgets, self.budgets[1:], strict=False))
        ):
            raise FlexmoeError(f"budgets must rise from 0, found {list(self.budgets)}")
        if not set(self.layers) == set(self.order) == set(self.width):
            raise FlexmoeError("layers, order and width of the plan name different layers")
        for i, layer in self.layers.items():
            order, width, full = self.order[i], self.width[i], layer.channels
            if order.shape != (layer.experts, full) or width.shape != (B, layer.experts):
                raise FlexmoeError(
                    f"layer {i}: order {tuple(order.shape)} and width {tuple(width.shape)} do not "
                    f"fit {layer.experts} experts of {full} channels and {B} budgets"
                )
            if not torch.equal(order.long().sort(1).values, torch.arange(full).expand_as(order)):
                raise FlexmoeError(f"layer {i}: order is not a permutation of the channels")
            if (width[0] != full).any():
                raise FlexmoeError(f"layer {i}: budget 0 must keep all {full} channels")
            if (width.diff(dim=0) > 0).any() or (width < 0).any():
                raise FlexmoeError(f"layer {i}: widths grow with the budget: members not nested")
            if ((width % self.quantum != 0) & (width != full)).any():
                raise FlexmoeError(f"layer {i}: widths are not multiples of {self.quantum}")
        for share in self.budgets:
            achieved = self.member(share).achieved
            if abs(achieved - share) > self.tolerance:
                raise FlexmoeError(
                    f"budget {share:g} is missed: its widths prune {achieved:.4f} "
                    f"(allowed {self.tolerance:.4f} beside it)"
                )

    def check_fits(self, model_type: str, shapes: Mapping[int, LayerShape]) -> None:
        """Raise `FlexmoeError` unless a model of these MoE layers is what the plan is for."""
        if model_type != self.recipe.model_type:
            raise FlexmoeError(
                f"the plan is of another model: it was made for {self.recipe.base_model} of "
                f"model_type '{self.recipe.model_type}', this one's is '{model_type}'"
            )
        for i in sorted(shapes.keys() | self.layers.keys()):
            wanted = self.layers[i].shape if i in self.layers else None
            if shapes.get(i) != wanted:
                raise FlexmoeError(
                    f"the plan is of another model: layer {i} of {self.recipe.base_model} is "
                    f"{wanted}, here it is {shapes.get(i)}"
                )

    def check_router_kept(self, why: str, exports: bool = True) -> None:
        """`FlexmoeError` that begins with ``why`` if this plan changes the router; ``exports``:
        whether one of those would do instead."""
        if self.recipe.router != "keep":
            raise FlexmoeError(
                f"{why}, and this plan has the router rule '{self.recipe.router}': "
                + "use an export of one budget, or " * exports
                + "compress with --router keep"
            )

    @property
    def tolerance(self) -> float:
        """How far a budget may lie beside the share asked for: 0.25 % or one quantum; of whole
        experts, half a one in every layer (and group of the router)."""
        if self.recipe.unit == "expert":
            ones = sum(r.channels * r.channel_parameters for r in self.layers.values())
            return self.recipe.router_groups * ones / 2 / self.routed_parameters + 1e-9
        largest = max(layer.channel_parameters for layer in self.layers.values())
        return max(0.0025, self.quantum * largest / self.routed_parameters)

    # --- files ---------------------------------------------------------------------------------

    def save(self, folder: str | Path, *, ranked: bool = False) -> Manifest:
        """Write the two files into ``folder``; returns what went into ``flexmoe.json``."""
        self.check()
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {f"layers.{i}.order": t.int().contiguous() for i, t in self.order.items()}
        tensors |= {f"layers.{i}.width": t.int().contiguous() for i, t in self.width.items()}
        tensors |= {f"layers.{i}.constant": t.contiguous() for i, t in self.constant.items()}
        content = save(tensors)
        manifest = Manifest(
            format=FORMAT,
            ranked=ranked,
            quantum=self.quantum,
            recipe=self.recipe,
            layers=self.layers,
            budgets=[self.member(share) for share in self.budgets],
            bytes_per_parameter=self.bytes_per_parameter,
            tensors_sha256=hashlib.sha256(content).hexdigest(),
        )
        write_whole(folder / TENSORS_NAME, content)
        write_sealed(folder / JSON_NAME, manifest)
        return manifest

    @classmethod
    def load(cls, folder: str | Path) -> Plan:
        """Read and check the two files in ``folder``."""
        manifest = read_manifest(folder)
        path = Path(folder) / TENSORS_NAME
        if not path.is_file():
            raise FlexmoeError(f"{path} is missing: {JSON_NAME} stands there without its tensors")
        if hashlib.sha256(path.read_bytes()).hexdigest() != manifest.tensors_sha256:
            raise FlexmoeError(f"{path} is damaged or of another plan: its sha256 does not fit")
        tensors = load_file(path)
        return cls(
            layers=manifest.layers,
            order={i: tensors[f"layers.{i}.order"] for i in manifest.layers},
            width={i: tensors[f"layers.{i}.width"] for i in manifest.layers},
            budgets=tuple(member.pruned for member in manifest.budgets),
            quantum=manifest.quantum,
            recipe=manifest.recipe,
            bytes_full=manifest.budgets[0].bytes,
            bytes_per_parameter=manifest.bytes_per_parameter,
            constant={
                i: tensors[name]
                for i in manifest.layers
                if (name := f"layers.{i}.constant") in tensors
            },
        )


def read_manifest(folder: str | Path) -> Manifest:
    """Read ``flexmoe.json`` of a family or plan; a `FlexmoeError` says what is wrong with it."""
    path = Path(folder) / JSON_NAME
    if not path.is_file():
        raise FlexmoeError(
            f"{folder} is not a flexmoe family or plan: it has no {JSON_NAME} "
            "(make one with: flexmoe compress MODEL -o FAMILY)"
        )
    again = "use the version that wrote it, or compress again"
    return read_sealed(path, Manifest, FORMAT, again)
