"""What made a folder: the record that cards keep, and the command lines it stands for."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.curve import of_weights, shards_sha256
from flexmoe.files import Strict, first_problem
from flexmoe.headers import EXPORT_NAME, read_json
from flexmoe.plan import JSON_NAME, Recipe, read_manifest
from flexmoe.progress import Track, silent
from flexmoe.training import processes

FORMAT = 1
CARD_NAME = "README.md"
FENCE = "```json flexmoe"  # begins the block of a card that holds its record
BLOCK = re.compile(rf"^{FENCE}\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Record(Strict):
    """How a folder was made and what came out: all that `flexmoe reproduce` needs.

    ``kind``: a family, a plan alone, or the layout of an export, which has ``pruned`` and the
    ``router`` rule.
    ``plan_sha256`` is of flexmoe.safetensors, "" where an export does not know it;
    ``weights_sha256`` see `shards_sha256`, of a plan alone what its recipe says.
    """

    format: int = FORMAT
    kind: Literal["family", "plan", "uniform", "ragged", "masked"]
    pruned: float | None = None
    router: str = "keep"
    recipe: Recipe
    plan_sha256: str
    weights_sha256: str


def record_of(folder: str | Path, track: Track = silent) -> Record:
    """The record of a family, plan or export, with the sums of the files as they are now."""
    folder = Path(folder)
    if (folder / JSON_NAME).is_file():
        manifest, of = read_manifest(folder), of_weights(folder, track)
        return Record(
            kind="family" if manifest.ranked else "plan", recipe=manifest.recipe, **of.model_dump()
        )
    about = read_json(folder / EXPORT_NAME)
    content = {
        "format": FORMAT,
        "kind": about.get("layout"),
        "pruned": about.get("pruned"),
        "router": about.get("router", "keep"),
        "recipe": about.get("recipe"),
        "plan_sha256": about.get("plan_sha256", ""),
        "weights_sha256": shards_sha256(folder, track),
    }
    return _checked(content, folder / EXPORT_NAME)


def record_in(card: str | Path) -> Record:
    """The record that a card holds; a `FlexmoeError` says what is wrong with it."""
    found = BLOCK.search(Path(card).read_bytes().decode(errors="replace").replace("\r\n", "\n"))
    if found is None:
        raise FlexmoeError(
            f"{card} is no card of flexmoe: it has no block that begins with {FENCE}"
        )
    try:
        content = json.loads(found[1])
    except json.JSONDecodeError as error:
        raise FlexmoeError(f"the record in {card} is not valid JSON: {error}") from None
    return _checked(content, Path(card))


def _checked(content: Any, where: Path) -> Record:
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise FlexmoeError(
            f"the record in {where} has format {version}, this flexmoe reads format {FORMAT}: use "
            "the version that wrote it"
        )
    try:
        return Record.model_validate(content)
    except ValidationError as error:
        raise FlexmoeError(f"the record in {where}: {first_problem(error)}") from None


def block(record: Record) -> str:
    """The record as the block of a card. Experts that saw little are a result and stay out."""
    content = record.model_dump(exclude={"recipe": {"thin_experts"}})
    return f"{FENCE}\n{json.dumps(content, indent=1)}\n```"


# --- What was asked ------------------------------------------------------------------------------


def given(config: Any) -> dict[str, Any]:
    """The settings of ``config`` that are not its defaults, as JSON holds them; also how many
    ``processes`` ran, if several did."""
    found = _changed(config)
    if (number := processes()[1]) > 1:
        found["processes"] = number
    return json.loads(json.dumps(found, default=str))


def _changed(config: Any) -> dict[str, Any]:
    default, found = type(config)(), {}
    for name, value in vars(config).items():
        inner = _changed(value) if dataclasses.is_dataclass(value) else value
        if inner != getattr(default, name) and inner != {}:
            found[name] = inner
    return found


def commands(record: Record) -> list[str]:
    """The command lines that make the folder again, with the options that are not defaults; empty
    where the record is from before options were kept."""
    recipe, of = record.recipe, "FAMILY"
    steps = [recipe.options, *(done.get("options") for done in recipe.recovery)]
    if not all(options is not None for options in steps):
        return []
    lines = [_line("compress", recipe.base_model, of, recipe.options or {})]
    for number, done in enumerate(recipe.recovery, 2):
        lines.append(_line("recover", of, f"FAMILY-{number}", done["options"]))
        of = f"FAMILY-{number}"
    if record.pruned is not None:
        options: dict[str, Any] = {"pruned": record.pruned, "layout": record.kind}
        if record.router != "keep":
            options["router"] = record.router
        lines.append(_line("export", of, "MODEL", options))
    return lines


def _line(command: str, of: str, out: str, options: Mapping[str, Any]) -> str:
    options = dict(options)
    number, learn = options.pop("processes", 1), options.pop("learn", {})
    if number > 1:
        options.pop("device", None)  # each process has its own
    if "steps" in learn:
        options["learn_steps"] = learn["steps"]
    words = ["flexmoe"] if number == 1 else f"torchrun --nproc-per-node {number} -m flexmoe".split()
    words += [command, of, "-o", out]
    for name, value in options.items():
        words.append(f"--{name.replace('_', '-')}")
        if value is not True:
            words.append(",".join(map(str, value)) if isinstance(value, list) else str(value))
    line = shlex.join(words)
    others = {name: value for name, value in learn.items() if name != "steps"}
    return f"{line}  # and from Python: learn {json.dumps(others)}" if others else line
