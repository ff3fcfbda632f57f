"""A stock checkpoint with fewer experts: those that go, their rows of the router and of all else
that has one for each expert, and the counts in config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.errors import FlexmoeError
from flexmoe.names import missing_parameters, parameter_names
from flexmoe.plan import Plan
from flexmoe.progress import Track, silent
from flexmoe.routing.counts import Counts, builder, find_counts
from flexmoe.routing.rules import check_table, kept_experts
from flexmoe.settings import with_values
from flexmoe.shards import Entry, Shards, Source, verify
from flexmoe.trace import Piece, trace


class Removal:
    """What it takes to write the member at ``pruned`` without the experts that its plan gives no
    channel. Raises `FlexmoeError` where the router cannot do without them, or layers would keep
    different numbers of experts."""

    def __init__(self, source: Source, plan: Plan, pruned: float):
        self.source = source
        self.counts = find_counts(source.model.config.to_dict(), builder(source.model))
        gone = {i: width_E == 0 for i, width_E in plan.widths(pruned).items()}
        self.kept = {i: kept_experts(self.counts, gone_E, i) for i, gone_E in gone.items()}
        numbers = sorted({len(kept_n) for kept_n in self.kept.values()})
        if len(numbers) > 1:
            raise FlexmoeError(
                f"the layers would keep between {numbers[0]} and {numbers[-1]} experts, "
                "config.json has one number: compress with --allocate layer, or use the layout "
                "ragged with --router keep"
            )
        self.counts.model(numbers[0])  # refuses what its router cannot do
        self.shards = _shards(source, self.counts, self.kept)
        self.config = with_values(source.checkpoint.config, self.counts.settings(numbers[0]))

    def check(self, out: Path, track: Track = silent) -> tuple[int, int]:
        """Read ``out`` again: every tensor is what was to be written, every expert is the one it
        should be, and the stock model finds all it needs. Returns the routed parameters and the
        number of experts; `FlexmoeError` at the first thing that differs."""
        written, model = Checkpoint(out), meta_model(out)
        verify(written, self.shards, track)
        missing_parameters(written, model)
        routed, checked = 0, 0
        for i, traced in trace(written, model).items():
            for n, e in enumerate(self.kept[i].tolist()):
                want = self.source.layers[i].expert(self.source.checkpoint, e)
                found = traced.expert(written, n)
                if any(not torch.equal(found[side], tensor) for side, tensor in want.items()):
                    raise FlexmoeError(
                        f"layer {i}: expert {n} read back from {out} is not expert {e} of the "
                        "source: the exporter is at fault, nothing was kept"
                    )
                routed += sum(tensor.numel() for tensor in found.values())
                checked += 1
        return routed, checked


def _shards(source: Source, counts: Counts, kept: Mapping[int, Tensor]) -> Shards:
    """Entries by shard file: experts that stay under their new numbers, rows of what has one for
    each of them, all else as it is."""
    checkpoint = source.checkpoint
    pieces = {piece.name: (i, piece) for i, t in source.layers.items() for piece in t.stored}
    rows = _stored_rows(source, counts)
    rows |= {name: (i, 0) for name, (i, piece) in pieces.items() if piece.expert is None}
    shards: Shards = {file: [] for file in checkpoint.files}
    for name, info in checkpoint.tensors.items():
        entry = _entry(checkpoint, name)
        if name in rows:
            i, axis = rows[name]
            entry = _entry(checkpoint, name, axis, kept[i])
        elif name in pieces:
            i, piece = pieces[name]
            number = (kept[i] == piece.expert).nonzero().flatten().tolist()
            if not number:
                continue
            entry = replace(entry, name=_named(source, i, piece, number[0]))
        shards[info.file].append(entry)
    return {file: entries for file, entries in shards.items() if entries}


def _entry(checkpoint: Checkpoint, name: str, axis: int = 0, kept_n: Tensor | None = None) -> Entry:
    """A tensor as it is, or the rows ``kept_n`` of it."""
    info = checkpoint.tensors[name]
    shape, make = list(info.shape), partial(checkpoint.tensor, name)
    if kept_n is not None:
        shape[axis] = len(kept_n)
        make = partial(_rows_of, checkpoint, name, axis, kept_n)
    return Entry(name, info.dtype, tuple(shape), make)


def _named(source: Source, i: int, piece: Piece, number: int) -> str:
    """The name that a tensor of one expert has for the expert ``number``."""
    return next(
        p.name
        for p in source.layers[i].stored
        if p.expert == number and (p.sides, p.axis) == (piece.sides, piece.axis)
    )


def _rows_of(checkpoint: Checkpoint, name: str, axis: int, kept_n: Tensor) -> Tensor:
    return checkpoint.tensor(name).index_select(axis, kept_n)


def _stored_rows(source: Source, counts: Counts) -> dict[str, tuple[int, int]]:
    """The checkpoint's tensors beside the experts with a row for each: layer and axis."""
    stands = {name: (i, axis) for i, of in counts.rows.items() for name, axis in of.items()}
    found = {}
    for stored, parameter in parameter_names(source.checkpoint, source.model).items():
        if parameter in stands:
            found[stored] = stands.pop(parameter)
        elif any(parameter.startswith(f"{block}.") for block in counts.blocks.values()):
            if not source.checkpoint.tensors[stored].dtype.startswith(("F", "BF", "BOOL")):
                check_table(stored, source.checkpoint.tensor(stored), counts)
    kept_in_file = source.model.state_dict().keys()
    if lost := [name for name in stands if name in kept_in_file]:
        raise FlexmoeError(
            f"the checkpoint stores {lost[0]} in a form that cannot be cut: use --router keep"
        )
    return found
