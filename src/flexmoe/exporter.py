"""Write checkpoints of one member of a family, or the ranked family itself.

The model is never loaded: tensors go from file to file one at a time, so the memory needed is that
of the largest tensor. What was written is read again and compared before it gets its name.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.evidence import Evidence
from flexmoe.family import find_folder, open_source
from flexmoe.files import refuse_existing, refuse_full, remove_stale, written_beside
from flexmoe.headers import EXPORT_NAME, resolve
from flexmoe.hf import CONSTANT, FORMAT, WITH_CONSTANTS
from flexmoe.kernels.torch_loop import activations
from flexmoe.memory import give_back
from flexmoe.plan import Plan, Recipe, read_manifest
from flexmoe.progress import Track, silent
from flexmoe.reports.card import write_card
from flexmoe.routing.removal import Removal
from flexmoe.routing.rules import rule_of_export
from flexmoe.shards import (
    Cut,
    RaggedNames,
    Source,
    others,
    ragged,
    ragged_names,
    same_names,
    verify,
    with_constants,
    write,
)
from flexmoe.storage import activation_function
from flexmoe.trace import trace
from flexmoe.uniform import uniform_config, uniform_width
from flexmoe.widths import LAYOUTS

PROBES = 4  # random input vectors each expert is compared on
# The same float32 products are summed in both experts, grouped differently by the matrix sizes.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class ExportReport:
    """What an export came to. ``pruned`` is the achieved share, ``bytes`` the size of all tensors
    written, ``checked`` the number of experts compared with the source and ``max_difference`` the
    largest difference found, relative to the expert's largest output. ``read`` counts the bytes of
    the source that were looked at: a ragged export does not read experts of width 0."""

    path: Path
    layout: str
    pruned: float
    routed_parameters: int
    bytes: int
    checked: int
    max_difference: float
    read: int


def rank_checkpoint(source: Path, plan: Plan, out: Path, track: Track = silent) -> None:
    """Write the family's weights into the existing folder ``out``: the checkpoint ``source`` with
    the channels of each expert in the plan's order, the same function. Names, dtypes, shard files
    and all other files stay as they are. Raises `FlexmoeError` if the re-read experts differ."""
    opened = Source.open(Path(source), plan)
    cuts = {
        i: Cut(order.long(), [plan.layers[i].channels] * len(order), [order.shape[1]] * len(order))
        for i, order in plan.order.items()
    }
    copy_others(opened.checkpoint, Path(out))
    write(Path(out), same_names(opened, cuts), track)
    _compare(opened, cuts, Path(out), None, track)


def write_family(
    source: Path,
    plan: Plan,
    out: str | Path,
    track: Track = silent,
    evidence: Evidence | None = None,
) -> Path:
    """The checkpoint ``source``, ranked, with the plan and what it rests on beside it, compared
    with the source before it counts."""
    out = Path(out).expanduser()
    with written_beside(out) as partial:
        rank_checkpoint(source, plan, partial, track)
        if evidence is not None:
            evidence.save(partial)
        plan.save(partial, ranked=True)
        write_card(partial, track=track)
    return out


def check_room(model: str | Path, out: str | Path) -> None:
    """`FlexmoeError` unless ``out`` can be made and the family fits on its disk."""
    refuse_existing(out)
    remove_stale(out)
    refuse_full(out, Checkpoint(resolve(model)).bytes, "the family")


def export(
    family: str | Path,
    out: str | Path,
    *,
    pruned: float,
    layout: str,
    router: str | None = None,
    base: str | Path | None = None,
    track: Track = silent,
) -> ExportReport:
    """Write the member at ``pruned`` of a family, or of a plan alone applied to its base model.

    ``layout`` is ``uniform`` (one width for all experts, loads everywhere; the plan's own widths
    do not apply), ``ragged`` (the plan's widths, loads where flexmoe is installed) or ``masked``
    (stock shapes, pruned channels zero). Of a plan of whole experts ``uniform`` takes those that go
    out of the router too, which must be said: ``router`` is ``remove`` then (None: what the plan
    says, see `routing.rules`); constants stand in a ``ragged`` one. ``base`` says where the base
    model of a plan alone is.
    ``out`` appears complete or not at all; a `FlexmoeError` says what stands in the way.
    """
    if layout not in LAYOUTS:
        raise did_you_mean(layout, LAYOUTS, "layout")
    out = Path(out).expanduser()
    refuse_existing(out)
    folder = find_folder(family)
    manifest, plan = read_manifest(folder), Plan.load(folder)
    source = open_source(folder, plan, base)
    rule = rule_of_export(plan.recipe, layout, router, bool(plan.constant))
    config: dict[str, Any] | None
    if rule == "remove":
        removal = Removal(source, plan, pruned)
        entries, config = removal.shards, removal.config
    else:
        cuts, config = _cuts(source, plan, manifest.ranked, pruned, layout)
        names = ragged_names(source) if layout == "ragged" else None
        entries = ragged(source, cuts, names) if names else same_names(source, cuts)
        if rule == "constant" and config is not None:
            entries = with_constants(source, entries, plan.constant)
            config["quantization_config"]["format"] = WITH_CONSTANTS

    needed = sum(entry.bytes for shard in entries.values() for entry in shard)
    refuse_full(out, needed, "the export")
    with written_beside(out) as partial:
        copy_others(source.checkpoint, partial)
        if config is not None:
            write_config(source.checkpoint, partial, config)
        write(partial, entries, track)
        if rule == "remove":
            (routed, checked), difference = removal.check(partial, track), 0.0
        else:
            routed, checked, difference = _compare(source, cuts, partial, names, track)
            if rule == "constant":
                added = [e for shard in entries.values() for e in shard if CONSTANT in e.name]
                verify(Checkpoint(partial), {"": added})
        achieved = 1 - routed / plan.routed_parameters
        _describe(partial, layout, pruned, achieved, rule, plan.recipe, manifest.tensors_sha256)
        write_card(partial, family=folder, track=track)
        size = Checkpoint(partial).bytes
    read = source.checkpoint.bytes_read
    return ExportReport(out, layout, achieved, routed, size, checked, difference, read)


def _cuts(
    source: Source, plan: Plan, ranked: bool, pruned: float, layout: str
) -> tuple[dict[int, Cut], dict[str, Any] | None]:
    """What to keep of each layer, and the new config.json (None: unchanged)."""
    config = None
    if layout == "uniform":
        width = uniform_width(plan, pruned)
        config = uniform_config(source.checkpoint, source.experts, width)
        widths = {i: torch.full((r.experts,), width) for i, r in plan.layers.items()}
    else:
        widths = plan.widths(pruned)
    cuts = {}
    for i, record in plan.layers.items():
        order = plan.order[i].long()
        if ranked:
            order = torch.arange(record.channels).expand_as(order)
        kept = widths[i].tolist()
        cuts[i] = Cut(order, kept, [record.channels] * len(kept) if layout == "masked" else kept)
    if layout == "ragged":
        config = source.checkpoint.config | {
            "quantization_config": {
                "quant_method": "flexmoe",
                "format": FORMAT,
                "widths": {str(i): cut.width_E for i, cut in cuts.items()},
                "quantum": plan.quantum,
                "pruned": pruned,
            }
        }
    return cuts, config


def copy_others(source: Checkpoint, out: Path) -> None:
    """Copy all files of a checkpoint that are not weights into the existing folder ``out``."""
    for name in source.other_files():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.path / name, out / name)


def write_config(source: Checkpoint, out: Path, config: dict[str, Any]) -> None:
    """Write config.json into the folder ``out``, in the letters that the source has it in."""
    ascii_only = (source.path / "config.json").read_bytes().isascii()
    text = json.dumps(config, indent=2, ensure_ascii=ascii_only) + "\n"
    (out / "config.json").write_text(text, encoding="utf-8")


def _describe(
    out: Path,
    layout: str,
    pruned: float,
    achieved: float,
    router: str,
    recipe: Recipe,
    plan_sha256: str,
) -> None:
    about = {
        "format": 1,
        "layout": layout,
        "pruned": pruned,
        "achieved": achieved,
        "router": router,
        "plan_sha256": plan_sha256,
        "recipe": recipe.model_dump(),
    }
    (out / EXPORT_NAME).write_text(json.dumps(about, indent=2) + "\n")


# --- What was written, compared with the source ------------------------------------------------


def _compare(
    source: Source,
    cuts: dict[int, Cut],
    out: Path,
    names: RaggedNames | None,
    track: Track,
) -> tuple[int, int, float]:
    """Read ``out`` again and compare: every expert with the source's at full width whose pruned
    channels are silenced, all other tensors bit by bit.

    Returns the routed parameters found in the files, the number of experts compared and the
    largest relative difference; raises `FlexmoeError` at the first thing that differs.
    """
    written = Checkpoint(out)
    layers = {} if names else trace(written, meta_model(out))
    give_back()  # what one step has freed would lie beside what the next one holds
    verify(written, others(source))
    give_back()
    generator = torch.Generator().manual_seed(0)
    routed, checked, largest = 0, 0, 0.0
    for i in track(list(cuts), "compare"):
        cut = cuts[i]
        traced, module = source.layers[i], source.layers[i].layer.module
        for e, w in enumerate(cut.width_E):
            checked += 1
            if names and not w:
                stored = [written.tensors[n] for (f, _), n in names[i].items() if f == e]
                if any(info.bytes for info in stored):
                    raise FlexmoeError(f"layer {i} expert {e} in {out} has channels, expected none")
                routed += traced.layer.shape.fixed_parameters
                continue
            whole = traced.expert(source.checkpoint, e)
            found = _read(written, whole, names[i], e) if names else layers[i].expert(written, e)
            x_nH = torch.randn(PROBES, traced.layer.H, generator=generator)
            kept = torch.zeros(traced.layer.I, dtype=torch.bool)
            kept[cut.order_EI[e, :w]] = True
            want_nH = _output(module, whole, x_nH, kept)
            got_nH = _output(module, found, x_nH, None)
            scale = float(want_nH.abs().max())
            difference = float((got_nH - want_nH).abs().max()) / (scale or 1.0)
            tail = [t[w:] for side, t in found.items() if side != "down_bias"]
            if not difference <= TOLERANCE or any(t.any() for t in tail):
                raise FlexmoeError(
                    f"layer {i} expert {e} read back from {out} differs from the source by "
                    f"{difference:.1e} of its output (allowed {TOLERANCE:.0e}): the disk or the "
                    "exporter is at fault, nothing was kept"
                )
            routed += sum(
                t.numel() if side == "down_bias" else t[:w].numel() for side, t in found.items()
            )
            largest = max(largest, difference)
    return routed, checked, largest


def _read(
    written: Checkpoint, like: dict[str, Tensor], names: dict[tuple[int, str], str], e: int
) -> dict[str, Tensor]:
    """One ragged expert in the form of `TracedLayer.expert`."""
    found = {}
    for side, tensor in like.items():
        if (e, side) in names:
            tensor = written.tensor(names[e, side])
            tensor = tensor.mT if side == "down" else tensor
        found[side] = tensor
    return found


def _output(
    module: nn.Module, expert: dict[str, Tensor], x_nH: Tensor, kept_I: Tensor | None
) -> Tensor:
    """An expert's output for ``x_nH`` in float32, channels outside ``kept_I`` silenced."""
    part = {side: tensor.float() for side, tensor in expert.items()}
    sides = [side for side in ("gate", "up") if side in part]
    bias = [part.get(f"{side}_bias") for side in sides]
    h_nI = activations(x_nH, [part[side] for side in sides], bias, activation_function(module))
    if kept_I is not None:
        h_nI = torch.where(kept_I, h_nI, 0.0)
    y_nH = h_nI @ part["down"]
    return y_nH + part["down_bias"] if "down_bias" in part else y_nH
