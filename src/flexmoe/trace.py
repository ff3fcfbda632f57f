"""Where in a checkpoint the channels of experts are.

Which hub tensors hold which channels differs from family to family (one tensor an expert or one
for all, gate and up apart, joined or interleaved, transposed or not). Instead of a table there is
a trace: the experts' parameters are filled with numbers that name their own place, transformers'
own converter turns them into hub tensors, and the numbers found there say what is where.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from flexmoe.checkpoint import Checkpoint
from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers
from flexmoe.headers import refuse_ragged
from flexmoe.hf import SIDES_OF
from flexmoe.names import Names, Patterns
from flexmoe.plan import Plan

SIDES = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
BEGINNING = 4096  # bytes of a tensor outside the experts that its fingerprint looks at
CODED_HIDDEN = 3  # hidden size of the coded parameters: enough to see which axis is hidden


@dataclass(frozen=True)
class Piece:
    """What one checkpoint tensor holds of the experts of one layer.

    ``expert`` is the one expert it belongs to, or None when axis 0 runs over all experts.
    ``axis`` (-1 or -2) runs over channels, of each of ``sides`` in turn (``interleaved`` or not);
    None for a down bias, which has none.
    """

    name: str
    shape: tuple[int, ...]
    expert: int | None
    axis: int | None
    sides: tuple[str, ...]
    interleaved: bool

    def rows(self, side: str, width: int) -> slice:
        """Where ``side`` stands along the channel axis of a tensor with ``width`` channels."""
        k, n = self.sides.index(side), len(self.sides)
        return slice(k, None, n) if self.interleaved else slice(k * width, (k + 1) * width)

    def read(self, checkpoint: Checkpoint, expert: int) -> dict[str, Tensor]:
        """One expert's part as stored, see `views`; the other experts' parts are not read."""
        row = expert if self.expert is None else None
        return self.views(checkpoint.tensor(self.name, row))

    def views(self, tensor: Tensor) -> dict[str, Tensor]:
        """One expert's tensor as views, side -> [w, H] (biases [w]; a down bias [H])."""
        if self.axis is None:
            return {side: tensor for side in self.sides}
        tensor = tensor.movedim(self.axis, 0)
        width = tensor.shape[0] // len(self.sides)
        return {side: tensor[self.rows(side, width)] for side in self.sides}


@dataclass(frozen=True)
class TracedLayer:
    """The checkpoint tensors of one layer's experts: ``stored`` as they are in the checkpoint,
    ``standard`` as transformers would save them."""

    layer: ExpertLayer
    stored: list[Piece]
    standard: list[Piece]

    def expert(self, checkpoint: Checkpoint, expert: int) -> dict[str, Tensor]:
        """One expert as stored, as views side -> [I, H], biases [I], a down bias [H]."""
        views: dict[str, Tensor] = {}
        for piece in self.stored:
            if piece.expert in (None, expert):
                views |= piece.read(checkpoint, expert)
        return views


def trace(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[int, TracedLayer]:
    """Find the tensors of ``checkpoint`` that hold expert channels, by layer number.

    ``model`` is its `meta_model`. Raises `FlexmoeError` naming the tensors that are missing, do
    not fit config.json or hold channels in a way that cannot be read.
    """
    refuse_ragged(checkpoint.path, checkpoint.config)
    names = Names(model)
    stored = names.groups(checkpoint.tensors)
    found = {}
    for layer in expert_layers(model):
        pieces: list[Piece] = []
        tried: list[dict[str, Piece]] = []
        missing = [f"{layer.name}.{name}" for name in _coded(layer)]
        for layout in _layouts(model, layer):
            tried.append(layout)
            groups = names.groups(layout)
            for parameter in list(missing):
                if matched := _match(checkpoint, stored[parameter], groups[parameter], layout):
                    pieces += matched
                    missing.remove(parameter)
            if not missing:
                break
        else:
            raise _no_match(checkpoint, missing[0], stored[missing[0]], list(tried[0].values()))
        found[layer.index] = TracedLayer(layer, pieces, list(tried[0].values()))
    return found


def fingerprint(checkpoint: Checkpoint, layers: dict[int, TracedLayer]) -> str:
    """What tells these very weights in this very order of channels from all others (compare with
    `same_weights`): sha256 of expert 0 of every layer and the beginnings of all tensors outside the
    experts; then, after a colon, of expert 0's down channels alone, which is all that older
    versions noted."""
    digest, of_down = hashlib.sha256(), hashlib.sha256()
    for _, traced in sorted(layers.items()):
        for side, tensor in sorted(traced.expert(checkpoint, 0).items()):
            content = tensor.contiguous().flatten().view(torch.uint8).numpy().data
            digest.update(content)
            if side == "down":
                of_down.update(content)
    of_experts = {piece.name for traced in layers.values() for piece in traced.stored}
    for name in sorted(checkpoint.tensors.keys() - of_experts):
        digest.update(name.encode() + checkpoint.beginning(name, BEGINNING))
    return f"{digest.hexdigest()}:{of_down.hexdigest()}"


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, as far as both of them tell."""
    if ":" in one and ":" in other:
        return one == other
    return one.rpartition(":")[2] == other.rpartition(":")[2]


def check_weights(plan: Plan, checkpoint: Checkpoint, layers: dict[int, TracedLayer]) -> None:
    """Raise `FlexmoeError` unless a plan alone was made for exactly these weights."""
    wanted = plan.recipe.weights_sha256
    if wanted and not same_weights(found := fingerprint(checkpoint, layers), wanted):
        raise FlexmoeError(
            f"the weights in {checkpoint.path} (sha256 {found[:12]}) are not those that the plan "
            f"was made for (sha256 {wanted[:12]} of {plan.recipe.base_model}): they may be of "
            "another revision, fine-tuned, or have their channels in order already. Give the "
            "folder of those weights as base"
        )


def _layouts(model: PreTrainedModel, layer: ExpertLayer) -> Iterator[dict[str, Piece]]:
    """The ways in which transformers reads this layer's experts, by tensor name, the one that it
    prefers first."""
    coded = {f"{layer.name}.{name}": tensor for name, tensor in _coded(layer).items()}
    # Some converters look at the model's shapes and do nothing where those fit already: once with
    # the shapes of the coded tensors (nothing to do), once with the real ones.
    with _coded_shapes(layer):
        unchanged = revert_weight_conversion(model, coded)
    decode = _Decoder(layer)
    yield {name: decode(name, tensor) for name, tensor in unchanged.items()}
    standard = revert_weight_conversion(model, coded)
    yield {name: decode(name, tensor) for name, tensor in standard.items()}
    yield {name: decode(name, tensor) for name, tensor in coded.items()}  # as in memory


def _match(
    checkpoint: Checkpoint, stored: Patterns, expected: Patterns, layout: dict[str, Piece]
) -> list[Piece]:
    """The pieces of ``layout`` under the names they have in the checkpoint; [] if they differ."""
    pieces = []
    for pattern in stored.keys() | expected.keys():
        here, there = stored.get(pattern, []), expected.get(pattern, [])
        if len(here) != len(there):
            return []
        for name, like in zip(here, there, strict=True):
            if checkpoint.tensors[name].shape != layout[like].shape:
                return []
            pieces.append(replace(layout[like], name=name))
    return pieces


def _no_match(
    checkpoint: Checkpoint, parameter: str, stored: Patterns, expected: list[Piece]
) -> FlexmoeError:
    here = [name for names in stored.values() for name in names]
    has = f"{len(here)} tensors" + "".join(
        f" (first {name} {list(checkpoint.tensors[name].shape)})" for name in here[:1]
    )
    like = expected[0]
    return FlexmoeError(
        f"the checkpoint has {has} for {parameter}, which do not fit config.json: it wants experts "
        f"such as {like.name} {list(like.shape)}. They do not belong together, or files are missing"
    )


@contextmanager
def _coded_shapes(layer: ExpertLayer) -> Iterator[None]:
    """The layer's parameters in the shapes of the coded tensors inside the block."""
    before = dict(layer.module.named_parameters(recurse=False))
    for name, tensor in _coded(layer).items():
        small = nn.Parameter(torch.empty(tensor.shape, device="meta"))
        layer.module.register_parameter(name, small)
    try:
        yield
    finally:
        for name, parameter in before.items():
            layer.module.register_parameter(name, parameter)


def _coded(layer: ExpertLayer) -> dict[str, Tensor]:
    """The layer's parameters with ``CODED_HIDDEN`` hidden values; each element is the number
    ((side * E + expert) * I + channel) * CODED_HIDDEN + hidden."""
    E, n = layer.E, layer.I
    hidden = torch.arange(CODED_HIDDEN)
    channel = torch.arange(n) * CODED_HIDDEN
    expert = torch.arange(E) * n * CODED_HIDDEN
    coded = {}
    for name, parameter in layer.parameters.items():
        shape = list(parameter.shape)
        if len(shape) == 3:  # the hidden axis is the one that is neither experts nor channels
            shape[1 if layer.module.is_transposed == (name != "down_proj") else 2] = CODED_HIDDEN
        coded[name] = torch.empty(shape, dtype=torch.int64)
        views = layer.channel_major(name, coded[name])
        first = SIDES.index(SIDES_OF[name][0])
        for side, view in enumerate(views, first):
            place = expert[:, None] + channel + side * E * n * CODED_HIDDEN
            view.copy_(place if view.dim() == 2 else place[:, :, None] + hidden)
    if layer.module.has_bias:
        side = SIDES.index("down_bias") * E * n * CODED_HIDDEN
        coded["down_proj_bias"] = side + expert[:, None] + hidden
    return coded


class _Decoder:
    """Reads the numbers of one layer's coded tensors: which side and expert, and what runs along
    each axis."""

    def __init__(self, layer: ExpertLayer):
        self.layer = layer
        self.expert_step = layer.I * CODED_HIDDEN
        self.side_step = layer.E * self.expert_step
        channel = torch.arange(layer.I) * CODED_HIDDEN
        both = torch.stack([channel, channel + self.side_step])
        self.known = {
            "hidden": torch.arange(CODED_HIDDEN),
            "channel": channel,
            "joined": both.flatten(),
            "interleaved": both.mT.flatten(),
            "expert": torch.arange(layer.E) * self.expert_step,
        }

    def __call__(self, name: str, tensor: Tensor) -> Piece:
        # Every element must be the first one plus what its place along each axis adds.
        start, rebuilt, axes = tensor.flatten()[0], tensor.flatten()[0], []
        for d in range(tensor.dim()):
            line = tensor.movedim(d, -1).flatten(0, -2)[0] - start
            rebuilt = rebuilt.unsqueeze(-1) + line
            axes.append(self._kind(line))
        side, place = divmod(int(start), self.side_step)
        expert, rest = divmod(place, self.expert_step)
        running = [kind for kind in axes if kind in ("channel", "joined", "interleaved")]
        fused, has_channels = axes[0] == "expert", SIDES[side] != "down_bias"
        hidden = "bias" not in SIDES[side] or not has_channels
        counted = len(running) == has_channels and len(axes) == fused + has_channels + hidden
        sound = not rest and torch.equal(rebuilt, tensor) and not (fused and expert)
        if not (sound and counted) or "?" in axes:
            raise FlexmoeError(
                f"{name}: flexmoe cannot tell how this tensor holds expert channels (its axes: "
                f"{', '.join(axes)}): transformers converts it in a way not seen before"
            )
        sizes = zip(axes, tensor.shape, strict=True)
        several = bool(running) and running[0] != "channel"
        return Piece(
            name=name,
            shape=tuple(self.layer.H if kind == "hidden" else size for kind, size in sizes),
            expert=None if fused else expert,
            axis=axes.index(running[0]) - len(axes) if running else None,
            sides=SIDES[side : side + 1 + several],
            interleaved=running == ["interleaved"],
        )

    def _kind(self, line: Tensor) -> str:
        return next((kind for kind, want in self.known.items() if torch.equal(line, want)), "?")
