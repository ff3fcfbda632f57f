"""Model cards: the README.md of a family or export, with the metadata that the Hub reads.

A card is written from the folder it lies in. The README.md that stands there, the base model's or
the card of the family it was made from, gives the licence and goes. `flexmoe eval --save` changes
only what stands between two marks, so that what people write beside is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from huggingface_hub.utils import HFValidationError, validate_repo_id
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from flexmoe.checkpoint import Checkpoint
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.compared import exported_share
from flexmoe.evaluation.curve import load_curve, stale
from flexmoe.evaluation.records import Curve, Point
from flexmoe.files import write_whole
from flexmoe.plan import Recipe, read_manifest
from flexmoe.progress import Track, silent
from flexmoe.reports.provenance import CARD_NAME, Record, block, commands, record_of
from flexmoe.reports.report import measured_rows, member_row, percent, size
from flexmoe.statistics import THIN

INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")
BEGIN, END = "<!-- flexmoe: measured -->", "<!-- flexmoe: end -->"
MEASURED = re.compile(rf"{BEGIN}\n.*?{END}", re.DOTALL)
LOADING = {
    "family": """\
import flexmoe

model = flexmoe.load("FOLDER", pruned=0.4)  # any share up to the largest below
flexmoe.set_budget(model, 0)  # switch while it runs; 0 is the full model
""",
    "ragged": """\
import flexmoe  # knows experts with widths of their own
from transformers import CLASS

model = CLASS.from_pretrained("FOLDER")
""",
}
LOADING["uniform"] = LOADING["masked"] = """\
from transformers import CLASS

model = CLASS.from_pretrained("FOLDER")
"""
NOTE = {
    "family": "Without flexmoe the folder loads as an ordinary checkpoint, at full width.",
    "ragged": "Engines without flexmoe refuse it: its tensors have other shapes than its config "
    "says.",
    "uniform": "All experts have the same width, so stock transformers loads it.",
    "masked": "Pruned channels are zeros: it is as large as the base model.",
}


def write_card(
    folder: str | Path, *, family: str | Path | None = None, track: Track = silent
) -> None:
    """Write the card of ``folder``, a family or export that is complete but for it. ``family`` is
    what an export was made from: its measured curve, if it has one that still holds, tells what
    the export is worth (but for uniform ones, whose widths are others)."""
    folder = Path(folder)
    record = record_of(folder, track)
    config = Checkpoint(folder).config
    inherited = _inherited(folder / CARD_NAME)
    gone = percent(exported_share(folder))
    curve = None
    if family is not None and record.kind != "uniform":
        curve = _holding(family, track)
    parts = [
        f"---\n{_metadata(record, config, inherited).to_yaml()}\n---\n",
        _heading(record, gone),
        "## Load\n\n" + _loading(record.kind, config),
        "## Sizes\n\n" + _sizes(folder, record, gone),
        f"## Measured\n\n{BEGIN}\n{_measured(curve, record.pruned)}\n{END}",
        "## What was lost, and limits\n\n" + _limits(record, inherited, gone),
        "## How it was made\n\n" + _made(record),
    ]
    text = "\n\n".join(part.strip("\n") for part in parts) + "\n"
    (folder / CARD_NAME).write_text(text, encoding="utf-8")


def _holding(family: str | Path, track: Track) -> Curve | None:
    """The measured curve of a family, if it has one that is sound and still holds."""
    try:
        curve = load_curve(family)
    except FlexmoeError:  # damaged: what is exported is none the worse for it
        return None
    return None if curve is None or stale(curve, family, track) else curve


def refresh_card(folder: str | Path, curve: Curve) -> None:
    """Put the measured curve into the card in ``folder``, if there is one that has a place for
    it."""
    path = Path(folder) / CARD_NAME
    if not path.is_file():
        return
    # what people wrote beside stays as it is, whatever its encoding
    text = path.read_bytes().decode(errors="surrogateescape")
    new = MEASURED.sub(lambda _: f"{BEGIN}\n{_measured(curve, None)}\n{END}", text, count=1)
    write_whole(path, new.encode(errors="surrogateescape"))


# --- Metadata ------------------------------------------------------------------------------------


def _inherited(path: Path) -> dict[str, Any]:
    """What a card hands on to the cards of models made from its own; nothing where it is missing
    or cannot be read."""
    if not path.is_file():
        return {}
    try:
        found = metadata_load(path) or {}
    except (ValueError, yaml.YAMLError):  # not text, not YAML, no mapping
        return {}
    return {name: found[name] for name in INHERITED if found.get(name) not in (None, "unknown")}


def _metadata(record: Record, config: dict[str, Any], inherited: dict[str, Any]) -> ModelCardData:
    fields = dict(inherited)
    fields.setdefault("license", "unknown")
    if config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        fields.setdefault("pipeline_tag", "text-generation")
    if _on_hub(record.recipe.base_model):
        fields["base_model"] = record.recipe.base_model
        if record.recipe.recovery:  # weights were trained; the Hub has no word for pruned alone
            fields["base_model_relation"] = "finetune"
    return ModelCardData(library_name="transformers", tags=["moe", "flexmoe", "pruned"], **fields)


def _on_hub(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


# --- Text ----------------------------------------------------------------------------------------


GONE = {"channel": "of every routed expert the channels", "expert": "the routed experts"}  # by unit


def _heading(record: Record, gone: str) -> str:
    recipe = record.recipe
    name = _code(Path(recipe.base_model).name)
    base = _code(recipe.base_model)
    if _on_hub(recipe.base_model):
        base = f"[{recipe.base_model}](https://huggingface.co/{recipe.base_model})"
        if recipe.revision:
            base += f", revision {_code(recipe.revision[:12])}"
    if record.pruned is None:
        title = f"# {name} as a family of sizes"
        what = (
            f"A nested family of smaller models made from {base} by flexmoe: the channels of every "
            "routed expert stand in order of worth, and each budget keeps a prefix of them. "
            "*Pruned 40 %* means that 40 % of the routed-expert parameters are gone."
        )
    else:
        title = f"# {name}, {gone} pruned ({record.kind})"
        what = (
            f"{base} without {gone} of its routed-expert parameters, pruned by "
            f"flexmoe: {GONE[recipe.unit]} that matter least are gone."
        )
    return f"{title}\n\n{what}"


def _loading(kind: str, config: dict[str, Any]) -> str:
    names = config.get("architectures") or ["AutoModelForCausalLM"]
    causal = config.get("model_type") in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    code = LOADING[kind].replace("CLASS", "AutoModelForCausalLM" if causal else names[0])
    return f"```python\n{code}```\n\n{NOTE[kind]}"


def _sizes(folder: Path, record: Record, gone: str) -> str:
    if record.pruned is not None:
        stored = size(Checkpoint(folder).bytes)
        return f"{stored} of tensors at {gone} pruned, layout {record.kind}."
    head = ("pruned", "exactly", "routed parameters", "active routed", "size (ragged export)")
    return _table(head, map(member_row, read_manifest(folder).budgets))


def _measured(curve: Curve | None, pruned: float | None) -> str:
    """The table of a curve; of an export only its own budget and the full model."""
    points: Sequence[Point] = [] if curve is None else curve.budgets
    if pruned is not None:
        points = [point for point in points if point.pruned == 0 or _same(point.pruned, pruned)]
        points = points if any(_same(point.pruned, pruned) for point in points) else []
    if curve is None or not points:
        where = "FAMILY --save" if pruned is None else "FOLDER"
        return f"Nothing yet. To measure: `flexmoe eval {where} --data FILE`"
    found = [point.model_dump(exclude_none=True) for point in points]
    # what is known of each file in full has its loss too
    rows = measured_rows(found, ("files",) if all("by_file" in of for of in found) else ())
    table = _table(
        ("", *(f"{percent(point.pruned)} pruned" for point in points)),
        ([_code(name) if ":" in name else name, *cells] for name, cells in rows.items()),
    )
    files = ", ".join(
        f"{_code(name)} ({file.windows} windows of {file.seq_len} tokens)"
        for name, file in curve.files.items()
    )
    said = ", ".join(f"{name} {version}" for name, version in curve.versions.items())
    of = "" if pruned is None else " on the family's member with these widths"
    base = curve.base if curve.against is None else _code(curve.base)
    return (
        f"{table}\n\nOn {files}{of}, compared with {base}. Loss in nats per token; *kept* is the "
        "share of the likelihood per token; in brackets 95 % intervals over the choice of text. "
        f"{curve.date}, {curve.hardware}, {curve.dtype}, {said}."
    )


def _same(a: float, b: float) -> bool:
    return abs(a - b) < 1e-9


def _limits(record: Record, inherited: dict[str, Any], gone: str) -> str:
    recipe = record.recipe
    points = []
    if record.pruned is None:
        points.append(
            "The smaller the member, the more is lost: see the table of what was measured."
        )
    else:
        points.append(
            f"The pruned {gone} cannot be had back from this folder, and what "
            "was measured above is all that is known of the loss."
        )
    points.append(
        "Nobody looked at other languages, long contexts, instructions or safety unless the table "
        "names them; they may have suffered more than the loss says."
    )
    if recipe.data:
        points.append(
            f"What was kept is what {_code(recipe.data)} needed; text unlike it loses more."
        )
    if thin := sum(map(len, recipe.thin_experts.values())):
        points.append(
            f"Experts that saw fewer than {THIN} tokens of it: {thin}. The order of their channels "
            "is a guess."
        )
    if record.kind == "uniform":
        points.append(
            "All experts were cut to one width: the widths that the plan gives each do not apply."
        )
    name = inherited.get("license_name") or inherited.get("license")
    points.append(
        f"Licence: {_code(str(name))}, inherited from the base model."
        if name
        else "Licence: unknown, the base model's files do not state it. Ask there before you share."
    )
    return "\n".join(f"- {point}" for point in points)


def _made(record: Record) -> str:
    recipe = record.recipe
    lines = commands(record)
    parts = ["```\n" + "\n".join(lines) + "\n```" if lines else _unrecorded(recipe)]
    first = "profile" if "tasks" in recipe.settings else "compress"
    rows = [(first, *_run(recipe.data_sha256, recipe.hardware, recipe.versions))]
    for done in recipe.recovery:
        rows.append(("recover", *_run(done.get("data_sha256", ""), done.get("hardware", ""), done)))
    head = ("", "tokens read (sha256)", "hardware", "versions")
    parts.append(_table(head, rows))
    parts.append(f"Weights (`sha256sum SHARDS | sha256sum`): {_code(record.weights_sha256)}")
    again = "`flexmoe reproduce README.md` makes it again and compares.\n\n" if lines else ""
    parts.append(again + block(record))
    return "\n\n".join(parts)


def _unrecorded(recipe: Recipe) -> str:
    """What is known where no commands make the folder again from the base model alone."""
    if "tasks" in recipe.settings:
        command = "flexmoe specialise MODEL --tasks {tasks} --keep {keep}".format(**recipe.settings)
        return f"{_code(command)}, from patterns that `flexmoe profile` made of the text below."
    return "The options of the commands were not recorded."


def _run(data: str, hardware: str, versions: dict[str, Any]) -> tuple[str, str, str]:
    known = ("flexmoe", "torch", "transformers")
    said = ", ".join(f"{name} {versions[name]}" for name in known if name in versions)
    return (_code(data[:16]) if data else "none", hardware or "unknown", said or "unknown")


def _code(text: str) -> str:
    """``text`` as a code span, whatever is in it."""
    text = " ".join(text.split())
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", text)), default=0))
    room = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{room}{text}{room}{fence}"


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---", *["---:"] * (len(lines[0]) - 1)])
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )
