"""The measured curve of a family: ``evaluation.json`` in its folder, and whether it still holds."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from flexmoe.checkpoint import Checkpoint
from flexmoe.environment import hardware, versions
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.compared import MODEL, Compared
from flexmoe.evaluation.records import Curve, OfWeights
from flexmoe.files import file_sha256, read_sealed, write_sealed
from flexmoe.headers import CURVE_NAME
from flexmoe.plan import JSON_NAME, read_manifest
from flexmoe.progress import Track, silent

FORMAT = 1


def of_weights(folder: str | Path, track: Track = silent) -> OfWeights:
    """The plan and weights in ``folder`` as they are now.

    ``weights_sha256`` is that of a family's shards, for a plan alone what its recipe says.
    """
    manifest = read_manifest(folder)
    weights = manifest.recipe.weights_sha256
    if manifest.ranked:
        weights = shards_sha256(folder, track)
    return OfWeights(plan_sha256=manifest.tensors_sha256, weights_sha256=weights)


def shards_sha256(folder: str | Path, track: Track = silent) -> str:
    """What ``sha256sum SHARDS | sha256sum`` says of a checkpoint's shards in the order of their
    names. All weights are read: about a second a gigabyte."""
    files = track(Checkpoint(folder).files, "checksum")
    lines = [f"{file_sha256(Path(folder) / name)}  {name}\n" for name in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def about(compared: Compared, inputs: Mapping[str, Any], command: str | None) -> dict[str, Any]:
    """When, how, on what and with what it was measured; ``inputs`` see `inputs.describe`.
    To be called once a model was loaded."""
    used = versions()
    if inputs["tasks"] is not None:
        used["lm_eval"] = version("lm_eval")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command,
        **inputs,
        "hardware": hardware(compared.device),
        "dtype": str(compared.shelf.dtypes[MODEL]).removeprefix("torch."),
        "versions": used,
    }


def make_curve(
    of: OfWeights,
    facts: Mapping[str, Any],
    members: Sequence[Mapping[str, Any]],
    against: Mapping[str, Any] | None = None,
) -> Curve:
    """The curve of ``members`` (see `evaluate.Measured`), with what `about` says of the
    run. Raises `FlexmoeError` where a result is not finite."""
    try:
        return Curve.model_validate(
            {**facts, "format": FORMAT, "of": of, "against": against, "budgets": list(members)}
        )
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][-1:]))
        raise FlexmoeError(
            f"the curve is not saved: {where} is {first['input']} ({first['msg']}). Check that "
            "tokenizer and weights belong together, or evaluate in float32 (--device cpu)"
        ) from None


# --- the file ----------------------------------------------------------------------------------


def check_can_save(path: str | Path) -> None:
    """`FlexmoeError` unless ``path`` is a local family or plan whose folder can be written."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise FlexmoeError(
            f"the curve is saved in the family's folder, and '{path}' is no local one: give the "
            "path of a local copy"
        )
    if not (folder / JSON_NAME).is_file():
        raise FlexmoeError(
            f"'{path}' has no budgets to save a curve of: it has no {JSON_NAME}. Give the family "
            "or plan it is from, or write the rows elsewhere with --json FILE"
        )
    if not os.access(folder, os.W_OK | os.X_OK):
        raise FlexmoeError(f"cannot write {CURVE_NAME}: no permission in '{folder}'")


def save_curve(folder: str | Path, curve: Curve) -> Path:
    """Write ``evaluation.json`` into ``folder``, whole or not at all; returns its path."""
    path = Path(folder) / CURVE_NAME
    try:
        write_sealed(path, curve)
    except OSError as error:
        raise FlexmoeError(f"cannot write {path}: {error.strerror}") from None
    return path


def load_curve(folder: str | Path) -> Curve | None:
    """The curve in ``folder``, or None where there is none; a `FlexmoeError` says what is wrong
    with it. Whether it still holds is another question: `stale`."""
    path = Path(folder) / CURVE_NAME
    if not path.is_file():
        return None
    return read_sealed(path, Curve, FORMAT, f"measure again: {command(folder)}")


def stale(curve: Curve, folder: str | Path, track: Track = silent) -> str | None:
    """Why ``curve`` is not of the plan and weights in ``folder`` as they are now; None if it is.
    Reads all weights, see `of_weights`."""
    if curve.of.plan_sha256 != read_manifest(folder).tensors_sha256:
        return f"the plan in {folder} is another one than the saved curve was measured with"
    if curve.of != of_weights(folder, track):
        return f"the weights in {folder} have changed since the saved curve was measured"
    return None


def command(folder: str | Path, *options: str, again: Curve | None = None) -> str:
    """The command that measures and saves the curve of ``folder``, compared with the same model as
    the curve that is measured ``again``."""
    words = ["flexmoe eval", shlex.quote(str(folder))]
    if again is not None and again.against is not None:
        words.append(f"--against {shlex.quote(again.against.model)}")
    return " ".join([*words, *options, "--save"])
