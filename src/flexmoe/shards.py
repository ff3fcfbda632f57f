"""Checkpoint shards with the channels of experts reordered and cut, written tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from flexmoe.checkpoint import DTYPES, Checkpoint, dtype_of, meta_model
from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer
from flexmoe.headers import INDEX_NAME, TensorInfo
from flexmoe.hf import CONSTANT, LEAVES, SIDES_OF
from flexmoe.names import parameter_names
from flexmoe.plan import Plan
from flexmoe.progress import Track, silent
from flexmoe.trace import Piece, TracedLayer, trace


@dataclass(frozen=True)
class Cut:
    """What to keep of one layer: ``order_EI`` long, the stored channel at each rank; ``width_E``
    channels kept; ``size_E`` channels written (the rest of them zeros)."""

    order_EI: Tensor
    width_E: list[int]
    size_E: list[int]


@dataclass(frozen=True)
class Entry:
    """One tensor to write, made only when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def itemsize(self) -> int:
        return dtype_of(self.name, self.dtype).itemsize

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.itemsize


@dataclass(frozen=True)
class Source:
    """A checkpoint to cut, its model without weights, and where its experts' channels are."""

    checkpoint: Checkpoint
    model: PreTrainedModel
    layers: dict[int, TracedLayer]

    @classmethod
    def open(cls, path: Path, plan: Plan) -> Source:
        checkpoint, model = Checkpoint(path), meta_model(path)
        layers = trace(checkpoint, model)
        plan.check_fits(model.config.model_type, {i: p.layer.shape for i, p in layers.items()})
        return cls(checkpoint, model, layers)

    @property
    def experts(self) -> list[ExpertLayer]:
        """The MoE layers of the model."""
        return [traced.layer for traced in self.layers.values()]


Shards = dict[str, list[Entry]]


def _all_shards(source: Source, of_piece: Callable[[int, Piece], list[Entry]]) -> Shards:
    """Entries by shard file: those of every tensor with channels, all others as they are."""
    pieces = {
        piece.name: (i, piece)
        for i, traced in source.layers.items()
        for piece in traced.stored
        if piece.axis is not None
    }
    shards: Shards = {file: [] for file in source.checkpoint.files}
    for name, info in source.checkpoint.tensors.items():
        if name in pieces:
            shards[info.file] += of_piece(*pieces[name])
        else:
            make = partial(source.checkpoint.tensor, name)
            shards[info.file].append(Entry(name, info.dtype, info.shape, make))
    return shards


def same_names(source: Source, cuts: dict[int, Cut]) -> Shards:
    """Every tensor under its own name, channels reordered and cut along its own axis."""

    def of_piece(i: int, piece: Piece) -> list[Entry]:
        info, cut = source.checkpoint.tensors[piece.name], cuts[i]
        size = cut.size_E[piece.expert or 0]  # of a tensor for all experts: the same for each
        assert piece.axis is not None
        shape = list(info.shape)
        shape[piece.axis] = size * len(piece.sides)
        make = partial(_rebuild, source.checkpoint, piece, cut, shape)
        return [Entry(piece.name, info.dtype, tuple(shape), make)]

    return _all_shards(source, of_piece)


def others(source: Source) -> Shards:
    """Every tensor without channels, as it is."""
    return _all_shards(source, lambda i, piece: [])


def _rebuild(checkpoint: Checkpoint, piece: Piece, cut: Cut, shape: list[int]) -> Tensor:
    new = torch.zeros(shape, dtype=DTYPES[checkpoint.tensors[piece.name].dtype])
    experts = range(len(cut.width_E)) if piece.expert is None else [piece.expert]
    for e in experts:
        target = piece.views(new[e] if piece.expert is None else new)
        best = cut.order_EI[e, : cut.width_E[e]]
        for side, view in piece.read(checkpoint, e).items():
            target[side][: len(best)] = view[best]
    return new


def replaced(source: Source, new: dict[str, Tensor]) -> Shards:
    """Every tensor as it is but for the model parameters in ``new``, by the model's name for
    them: experts in the layout of the checkpoint, others must be stored one to one. Raises
    `FlexmoeError` naming a parameter that is not."""
    layers = {traced.layer.name: traced for traced in source.layers.values()}
    shards = others(source)
    info = source.checkpoint.tensors
    outside = {p: tensor for p, tensor in new.items() if p.rpartition(".")[0] not in layers}
    names = parameter_names(source.checkpoint, source.model)
    beside = {stored: outside[p] for stored, p in names.items() if p in outside}
    lost = [p for p, new_p in outside.items() if all(new_p is not b for b in beside.values())]
    if lost:
        raise FlexmoeError(f"the checkpoint stores {lost[0]} in a form that cannot be rewritten")
    for file, entries in shards.items():
        shards[file] = [
            replace(entry, make=partial(_cast, beside[entry.name], info[entry.name]))
            if entry.name in beside
            else entry
            for entry in entries
        ]
    for name, traced in layers.items():
        for piece in traced.stored:
            if piece.axis is None:
                continue  # a down bias has no channels and is not trained
            own = info[piece.name]
            make = partial(_piece_of_model, new, name, traced, piece, own)
            shards[own.file].append(Entry(piece.name, own.dtype, own.shape, make))
    return shards


def down_replaced(
    source: Source, order: dict[int, Tensor], down: Callable[[int], Tensor]
) -> Shards:
    """Every tensor with its channels in ``order`` [E, I] by layer, but the down projections are
    ``down(layer)`` [E, I, H], which stand in that order already."""
    full = {i: [o.shape[1]] * len(o) for i, o in order.items()}
    shards = same_names(source, {i: Cut(order[i], full[i], full[i]) for i in order})
    info = source.checkpoint.tensors
    of_down = {
        piece.name: (i, piece)
        for i, traced in source.layers.items()
        for piece in traced.stored
        if piece.sides == ("down",) and piece.axis is not None
    }

    def make(name: str) -> Tensor:
        i, piece = of_down[name]
        return _stored(piece, info[name], {"down": down(i)})

    for file, entries in shards.items():
        shards[file] = [
            replace(entry, make=partial(make, entry.name)) if entry.name in of_down else entry
            for entry in entries
        ]
    return shards


def _cast(tensor: Tensor, info: TensorInfo) -> Tensor:
    return tensor.to(DTYPES[info.dtype]).reshape(info.shape)


def _piece_of_model(
    new: dict[str, Tensor], name: str, traced: TracedLayer, piece: Piece, info: TensorInfo
) -> Tensor:
    layer, views = traced.layer, dict[str, Tensor]()
    for parameter in layer.parameters:
        tensor = new[f"{name}.{parameter}"]
        views |= zip(SIDES_OF[parameter], layer.channel_major(parameter, tensor), strict=True)
    return _stored(piece, info, views)


def _stored(piece: Piece, info: TensorInfo, view_EIH: dict[str, Tensor]) -> Tensor:
    """A tensor of the checkpoint, made of channels [E, I, H] (biases [E, I]) by side."""
    stored = torch.empty(info.shape, dtype=DTYPES[info.dtype])
    experts = range(len(stored)) if piece.expert is None else [piece.expert]
    for e in experts:
        target = piece.views(stored[e] if piece.expert is None else stored)
        for side in piece.sides:
            target[side].copy_(view_EIH[side][e])
    return stored


RaggedNames = dict[int, dict[tuple[int, str], str]]  # layer -> (expert, side) -> tensor name


def ragged_names(source: Source) -> RaggedNames:
    """Names of ragged experts: the hub's where it has a tensor for each side of each expert (as
    stored, or as transformers would save it), else the experts module's path and our leaves."""
    names: RaggedNames = {}
    for i, traced in source.layers.items():
        if plain := _plain(traced):
            names[i] = {
                (p.expert, p.sides[0]): _as_stored(traced, p.name)
                for p in plain
                if p.expert is not None
            }
        else:
            own = [
                (e, side)
                for e in range(traced.layer.E)
                for piece in traced.stored
                if piece.axis is not None and piece.expert in (None, e)
                for side in piece.sides
            ]
            paths = [f"{traced.layer.name}.{e}.{LEAVES[side]}" for e, side in own]
            # transformers renames parents of the module for the hub: each name carries its number
            numbered = {path: torch.tensor(n) for n, path in enumerate(paths)}
            renamed = revert_weight_conversion(source.model, numbered)
            names[i] = {own[int(n)]: _as_stored(traced, name) for name, n in renamed.items()}
    return names


def _as_stored(traced: TracedLayer, name: str) -> str:
    """A name as transformers would save it, with what the checkpoint has before the number of the
    layer: the model may be a part of the stored one, which has a prefix more."""
    number = f".{traced.layer.index}."
    before, found, _ = traced.stored[0].name.partition(number)
    _, known, after = name.partition(number)
    return before + number + after if found and known else name


def _plain(traced: TracedLayer) -> list[Piece]:
    """The hub's tensors if each is a side of an expert, as stored or else as transformers would
    save them; [] if there is one for all experts."""
    layouts = (traced.stored, traced.standard)
    return next((pieces for pieces in layouts if all(map(_is_plain, pieces))), [])


def _is_plain(piece: Piece) -> bool:
    """[w, H] of gate or up, [H, w] of down, of one expert."""
    axis = -1 if piece.sides == ("down",) else -2
    return piece.expert is not None and len(piece.sides) == 1 and piece.axis == axis


def ragged(source: Source, cuts: dict[int, Cut], names: RaggedNames) -> Shards:
    """One tensor for each side of each expert, as long as the expert is wide. Where the hub has
    one for all experts, it stays with the shape [0]: engines without flexmoe, which know no other
    name, would else go on with random experts."""

    def of_piece(i: int, piece: Piece) -> list[Entry]:
        info, cut, entries = source.checkpoint.tensors[piece.name], cuts[i], []
        experts = range(len(cut.width_E)) if piece.expert is None else [piece.expert]
        for e in experts:
            for side in piece.sides:
                w, H = cut.width_E[e], source.layers[i].layer.H
                shape = (w,) if side.endswith("bias") else (H, w) if side == "down" else (w, H)
                make = partial(_best, source.checkpoint, piece, cut, e, side)
                if not w:  # nothing of it stays, so nothing of it is read
                    make = partial(torch.empty, shape, dtype=DTYPES[info.dtype])
                entries.append(Entry(names[i][e, side], info.dtype, shape, make))
        return entries

    shards = _all_shards(source, of_piece)
    for traced in source.layers.values():
        if not _plain(traced):
            info = source.checkpoint.tensors[traced.stored[0].name]
            make = partial(torch.empty, 0, dtype=DTYPES[info.dtype])
            for piece in traced.standard:
                if piece.axis is not None:
                    name = _as_stored(traced, piece.name)
                    shards[info.file].append(Entry(name, info.dtype, (0,), make))
    return shards


def with_constants(source: Source, shards: Shards, constant: dict[int, Tensor]) -> Shards:
    """The shards with what experts that are gone add, float32 [E, H] of every layer, beside its
    experts."""
    paths = {f"{traced.layer.name}.{CONSTANT}": i for i, traced in source.layers.items()}
    # transformers renames parents of the module for the hub: each name carries its layer
    renamed = revert_weight_conversion(source.model, {p: torch.tensor(i) for p, i in paths.items()})
    more: Shards = {file: list(entries) for file, entries in shards.items()}
    for name, i in renamed.items():
        tensor, traced = constant[int(i)].float(), source.layers[int(i)]
        file, name = source.checkpoint.tensors[traced.stored[0].name].file, _as_stored(traced, name)
        more[file].append(Entry(name, "F32", tuple(tensor.shape), partial(torch.clone, tensor)))
    return more


def _best(checkpoint: Checkpoint, piece: Piece, cut: Cut, e: int, side: str) -> Tensor:
    view = piece.read(checkpoint, e)[side]
    kept = view[cut.order_EI[e, : cut.width_E[e]]]
    return kept.mT if side == "down" else kept


def write(out: Path, shards: Shards, track: Track = silent) -> None:
    """Write all shards into ``out``, and their index: engines that take every safetensors file of
    a folder for weights take those of the index where there is one, and leave our tables alone."""
    for n, (file, entries) in enumerate(shards.items(), 1):
        _write_shard(out / file, entries, track, f"write {n}/{len(shards)}")
    names = {entry.name: file for file, entries in shards.items() for entry in entries}
    size = sum(entry.bytes for entries in shards.values() for entry in entries)
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
    (out / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


def _write_shard(path: Path, entries: list[Entry], track: Track, description: str) -> None:
    # as the safetensors library does it: larger types first, so that all stay aligned
    entries = sorted(entries, key=lambda entry: (-entry.itemsize, entry.name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        span = [end, end := end + entry.bytes]
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for entry in track(entries, description):
            stream.write(entry.make().contiguous().flatten().view(torch.uint8).numpy())


def verify(written: Checkpoint, shards: Shards, track: Track = silent) -> None:
    """Raise `FlexmoeError` unless every tensor, read again, is what was to be written."""
    entries = [entry for shard in shards.values() for entry in shard]
    for entry in track(entries, "compare"):
        same = entry.name in written.tensors and torch.equal(
            entry.make().contiguous().flatten().view(torch.uint8),
            written.tensor(entry.name).flatten().view(torch.uint8),
        )
        if not same:
            name = entry.name
            raise FlexmoeError(f"{name} read back from {written.path} is not what was written")
