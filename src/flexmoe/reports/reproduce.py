"""Make a folder again from what is recorded of it, and compare what comes out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from flexmoe.checkpoint import Checkpoint
from flexmoe.config import SETTINGS_OF, CompressConfig
from flexmoe.errors import FlexmoeError
from flexmoe.exporter import export
from flexmoe.files import first_problem, refuse_existing
from flexmoe.headers import EXPORT_NAME, resolve
from flexmoe.pipeline import compress
from flexmoe.plan import JSON_NAME, Plan, Recipe
from flexmoe.progress import Track, silent
from flexmoe.recover import recover
from flexmoe.recover_config import RecoverConfig
from flexmoe.reports.provenance import CARD_NAME, Record, commands, record_in, record_of
from flexmoe.trace import same_weights

RECORD_NAME = "record.json"  # in the folder of a rerun: what it is a rerun of
SPREAD = ("processes", "shard")  # how the work was spread: no part of the result but for rounding


@dataclass(frozen=True)
class Line:
    """One thing compared. ``equal`` is None for what is noted only: versions, hardware."""

    what: str
    recorded: str
    now: str
    equal: bool | None


@dataclass(frozen=True)
class Compared:
    """The outcome: lines, and what can be said of differences where both results are at hand."""

    lines: list[Line]
    details: list[str]

    @property
    def different(self) -> list[str]:
        """What is not as it was."""
        return [line.what for line in self.lines if line.equal is False]


def read_record(path: str | Path, track: Track = silent) -> tuple[Record, Path | None]:
    """The record of a card or folder; of a folder that holds a plan or an export also the folder,
    so that more than sums can be compared."""
    path = Path(path).expanduser()
    if path.is_file():
        return record_in(path), None
    if (path / JSON_NAME).is_file() or (path / EXPORT_NAME).is_file():
        return record_of(path, track), path
    if (path / CARD_NAME).is_file():
        return record_in(path / CARD_NAME), None
    raise FlexmoeError(
        f"'{path}' is no card, family, plan or export: give a {CARD_NAME} that flexmoe wrote, or a "
        f"folder with {JSON_NAME}, {EXPORT_NAME} or such a card"
    )


def rerun(
    record: Record,
    out: str | Path,
    *,
    model: str | None = None,
    data: str | None = None,
    device: str | None = None,
    track: Track = silent,
) -> Path:
    """Make again what ``record`` is of, step by step in the folder ``out``; returns the last
    step's folder.

    ``model``, ``data`` and ``device`` replace what is recorded, for inputs that lie elsewhere
    here. Started again with the same record and ``out``, a rerun goes on after its last finished
    step. Several processes are not started: this one does all the work.
    """
    recipe, out = record.recipe, Path(out).expanduser()
    if "tasks" in recipe.settings:
        raise FlexmoeError(
            "specialists are not made again: their patterns are, with flexmoe profile, and then "
            "flexmoe specialise takes the options that the card says"
        )
    if not commands(record):
        raise FlexmoeError(
            "this was made by a flexmoe that did not record its options: it cannot be made again "
            "from the record alone"
        )
    first = _config(CompressConfig, _options(recipe.options or {}, recipe), device)
    later = [_config(RecoverConfig, done["options"], device) for done in recipe.recovery]
    if data is not None:
        if any((first.data or "tiny") != config.data for config in later):
            raise FlexmoeError(
                "compress and recover read different text, so --data cannot replace it: put the "
                "files where they were and leave --data out"
            )
        first = dataclasses.replace(first, data=data)
        later = [dataclasses.replace(config, data=data) for config in later]
    try:
        resolve(model or recipe.base_model)
    except FlexmoeError as error:
        hint = "" if model else " If it lies elsewhere, say where with --model."
        raise FlexmoeError(f"the base model is needed: {error}.{hint}") from None

    _claim(out, record)
    folder = out / "1-compress"
    if not folder.exists():  # a step's folder appears when it is complete
        compress(model or recipe.base_model, folder, first, track=track)
    for number, config in enumerate(later, 2):
        family, folder = folder, out / f"{number}-recover"
        if not folder.exists():
            recover(family, folder, config, track=track)
    if record.pruned is not None:
        family, folder = folder, out / f"{len(later) + 2}-export"
        if not folder.exists():
            export(
                family,
                folder,
                pruned=record.pruned,
                layout=record.kind,
                router=record.router,
                track=track,
            )
    return folder


def _options(options: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The options of compress with the settings of its learning as their class."""
    found = dict(options)
    if "learn" in found:
        found["learn"] = _config(SETTINGS_OF[recipe.allocate], found["learn"])
    return found


def _config(kind: type[Any], options: Mapping[str, Any], device: str | None = None) -> Any:
    """The recorded ``options`` as settings of the class ``kind``."""
    fields = {name: value for name, value in options.items() if name not in SPREAD}
    fields |= {} if device is None else {"device": device}
    known = {field.name for field in dataclasses.fields(kind)}
    if strange := sorted(fields.keys() - known):
        raise FlexmoeError(
            f"the record has options that this flexmoe does not know ({', '.join(strange)}): use "
            "the version that made it"
        )
    try:
        return TypeAdapter(kind).validate_python(fields)
    except ValidationError as error:
        raise FlexmoeError(f"the record's options: {first_problem(error)}") from None


def _claim(out: Path, record: Record) -> None:
    """Make ``out`` the folder of a rerun of ``record``, if it is not already."""
    kept, content = out / RECORD_NAME, record.model_dump_json()
    if not kept.is_file() or kept.read_text() != content:
        refuse_existing(out)
        out.mkdir(parents=True, exist_ok=True)
        kept.write_text(content)


# --- Comparing -----------------------------------------------------------------------------------


def compare(
    record: Record, made: str | Path, original: Path | None = None, track: Track = silent
) -> Compared:
    """Compare the record with the folder ``made`` by `rerun`; ``original`` is the folder that the
    record is of, where it is at hand."""
    now = record_of(made, track)
    was, new = record.recipe, now.recipe
    same = same_weights(was.weights_sha256, new.weights_sha256)
    lines = [Line("base model's weights", was.weights_sha256, new.weights_sha256, same)]
    if was.data:
        lines.append(_line("calibration tokens", was.data_sha256, new.data_sha256))
    for number, (before, after) in enumerate(zip(was.recovery, new.recovery, strict=True), 1):
        what = "recovery tokens" if len(was.recovery) == 1 else f"tokens of recovery {number}"
        lines.append(_line(what, before["data_sha256"], after["data_sha256"]))
    if record.plan_sha256:
        lines.append(_line("plan", record.plan_sha256, now.plan_sha256))
    if record.kind != "plan":
        lines.append(_line("weights", record.weights_sha256, now.weights_sha256))
    for name in sorted(was.versions.keys() | new.versions.keys()):
        lines.append(Line(name, was.versions.get(name, ""), new.versions.get(name, ""), None))
    lines.append(Line("hardware", was.hardware, new.hardware, None))
    for before, after in zip(was.recovery, new.recovery, strict=True):
        there, here = str(before.get("hardware", "")), str(after.get("hardware", ""))
        lines.append(Line("hardware of recovery", there, here, None))
    if processes := (was.options or {}).get("processes"):
        lines.append(Line("processes", str(processes), "1", None))

    details = []
    different = [line.what for line in lines if line.equal is False]
    if original is not None and different:
        details += _width_details(original, Path(made))
        if "plan" not in different and "weights" in different:
            details += _weight_details(Checkpoint(original), Checkpoint(made))
    return Compared(lines, details)


def _line(what: str, recorded: str, now: str) -> Line:
    return Line(what, recorded, now, recorded == now)


def _width_details(original: Path, made: Path) -> list[str]:
    there, here = _widths(original), _widths(made)
    if not there or {i: w.shape for i, w in there.items()} != {i: w.shape for i, w in here.items()}:
        return []
    gaps = torch.cat([(there[i] - here[i]).abs().flatten() for i in there])
    equal = float((gaps == 0).double().mean())
    return [f"{equal:.2%} of the widths are equal, the largest difference is {int(gaps.max())}"]


def _widths(folder: Path) -> dict[int, Tensor]:
    """Widths [B, E] of a plan by layer, of a ragged export its one budget's [E]; else nothing."""
    if (folder / JSON_NAME).is_file():
        return Plan.load(folder).width
    about = Checkpoint(folder).config.get("quantization_config", {}).get("widths", {})
    return {int(i): torch.tensor(width) for i, width in about.items()}


def _weight_details(there: Checkpoint, here: Checkpoint) -> list[str]:
    if {n: t.shape for n, t in there.tensors.items()} != {
        n: t.shape for n, t in here.tensors.items()
    }:
        return ["the tensors have other names or shapes"]
    largest, where = 0.0, ""
    for name, info in there.tensors.items():
        if 0 in info.shape:
            continue
        gap = float((there.tensor(name).float() - here.tensor(name).float()).abs().max())
        if gap > largest:
            largest, where = gap, f" (in {name})"
    return [f"the largest difference of the weights is {largest:.1e}{where}"]
