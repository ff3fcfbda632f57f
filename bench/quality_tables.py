"""Tables of the ablations, of minimal pairs and of redundancy from the committed results; see
tables.py."""

from __future__ import annotations

import json
from pathlib import Path

from speed_tables import measured_in_parts, measured_on, results

RESULTS = Path(__file__).with_name("results")
MEASURED_WHOLE = ("tiny", "olmoe")  # the models on which all recipes are compared
REDUNDANT = {
    "olmoe": "16 x 64",
    "olmoe-experts": "64 x 64",
    "olmoe-wide": "16 x 256",
    "olmoe-upcycled": "16 x 64, upcycled",
}
PARTS = {  # as the rows are called, and what the table says of them
    "widths": "widths, same order inside the experts",
    "criterion": "ranking criterion, and what is done with it",
    "actions": "actions an expert of the paper's training",
    "samples": "windows of calibration text",
    "point": "recovered at",
}


def ablations() -> str:
    """What each part of the recipe is worth, one model and seed."""
    found = results("ablations")
    shares = ("0", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7", "0.8")
    lines = [f"| | {' | '.join(f'{float(s):.0%}' for s in shares)} |", "|---" * 9 + "|"]
    for part, title in PARTS.items():
        rows = [row for row in found["rows"] if row["recipe"].startswith(f"{part}: ")]
        if rows:
            lines.append(f"| **{title}** |" + " |" * len(shares))
        for row in sorted(rows, key=lambda row: row["nll_increase"]["0.4"]):
            loss = row["nll_increase"]
            cells = [f"{loss[s]:.4f}" if s in loss else "" for s in shares]
            name = row["recipe"].removeprefix(f"{part}: ")
            lines.append(f"| {name} | {' | '.join(cells)} |")
    (model,) = {row["model"] for row in found["rows"]}
    (seed,) = {row["seed"] for row in found["rows"]}
    note = f"Increase of the held-out loss, `{model}`, seed {seed}; windows as for the plans. "
    told = measured_in_parts(found, found["rows"], f"python bench/ablations.py {model}")
    return "\n".join([*lines, "", note + told])


def pairs() -> str:
    """BLiMP accuracy of the learned plan, alone and recovered, against the unpruned model."""
    files = [_pairs_of(model) for model in sorted(MEASURED_WHOLE)]
    lines = [
        "| model | | pruned | accuracy | of the unpruned | of its margin above chance |",
        "|---|---|---|---|---|---|",
    ]
    for found in files:
        for name, by_share in found["rows"].items():
            for share, row in by_share.items():
                if float(share) == 0 and name != "plan alone":
                    continue
                lines.append(
                    f"| {found['model']} | {name} | {float(share):.0%} | {row['accuracy']:.3f} | "
                    f"{_share(row, 'ratio')} | {_share(row, 'margin_ratio')} |"
                )
    note = (
        f"{files[0]['pairs']:,} pairs; 95 % intervals, paired. Learned plan of 256 x 256 tokens, "
        f"seed 0; recovered: `family`, {files[0]['recovery_tokens']:,} tokens. "
    )
    told = measured_on(files[0], "python bench/family.py pairs MODEL --pairs blimp.jsonl.gz")
    return "\n".join([*lines, "", note + told])


def redundancy() -> str:
    """The same recipe on models with more experts, wider ones, or upcycled from a dense one."""
    found = results("family")
    shares = ("0.2", "0.4", "0.5", "0.6", "0.8")
    lines = [
        f"| model | experts x channels | plan | {' | '.join(f'{float(s):.0%}' for s in shares)} | "
        "pairs kept at 50 % | of their margin |",
        "|---" * (len(shares) + 5) + "|",
    ]
    shown = []
    for model, shape in REDUNDANT.items():
        half = _pairs_of(model)["rows"]["plan alone"]["0.5"]
        for plan in ("learned", "global fisher", "uniform fisher"):
            wanted = (model, plan, 0)
            (row,) = [r for r in found["rows"] if (r["model"], r["recipe"], r["seed"]) == wanted]
            shown.append(row)
            losses = " | ".join(f"{row['nll_increase'][s]:.4f}" for s in shares)
            kept = " | "
            if plan == "learned":
                kept = f"{_share(half, 'ratio')} | {_share(half, 'margin_ratio')}"
            lines.append(f"| {model} | {shape} | {plan} | {losses} | {kept} |")
    note = "Increase of the held-out loss, seed 0, plans alone; pairs as in the table of pairs. "
    told = measured_in_parts(found, shown, "python bench/family.py plans MODEL")
    return "\n".join([*lines, "", note + told])


def _pairs_of(model: str) -> dict:
    return json.loads((RESULTS / f"pairs-{model}.json").read_text())


def _share(row: dict, name: str) -> str:
    low, high = row[f"{name}_interval"]
    return f"{row[name]:.3f} ({low:.3f} to {high:.3f})"
