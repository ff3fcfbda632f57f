"""Tables of README.md and docs/log.md from the committed results.

python bench/tables.py             # rewrites the blocks between <!-- table: NAME --> and end
python bench/tables.py --check     # exit code 1 if they are not what the results say
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from premoe_tables import premoe_bytes, premoe_loss, premoe_retrieval, premoe_scores
from quality_tables import MEASURED_WHOLE, ablations, pairs, redundancy
from speed_tables import (
    kernels,
    kernels_gpu,
    measured_in_parts,
    measured_on,
    model_speed,
    results,
    serve,
    vllm,
    vllm_architectures,
)

HERE = Path(__file__).parent
# of the frozen comparison, what README.md shows
SHORT = frozenset(
    "fisher fisher@global fisher@uniform camera heapr taylor peu mone reap frequency random "
    "random-experts".split()
)
SHARES = ("0.2", "0.4", "0.6", "0.8")


def methods(only: frozenset[str] | None = None) -> str:
    """Methods of the frozen comparison: increase of the loss, least at 40 % first."""
    found = results("compare")
    shares = sorted({row["pruned"] for row in found["rows"]})
    entries: dict[str, dict[float, dict]] = {}
    for row in found["rows"]:
        entries.setdefault(row["method"], {})[row["pruned"]] = row
    head = ["method", "allocate", "router", *(f"{share:.0%}" for share in shares)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name, rows in sorted(entries.items(), key=lambda item: item[1][0.4]["increase"]):
        if only is not None and name not in only:
            continue
        first = rows[shares[0]]
        cells = [name, first["allocate"], first["router"]]
        for share in shares:
            low, high = rows[share]["increase_interval"]
            text = f"{rows[share]['increase']:.3f} ±{(high - low) / 2:.3f}"
            cells.append(f"**{text}**" if rows[share]["as_good_as_the_best"] else text)
        lines.append("| " + " | ".join(cells) + " |")
    of = found["settings"]
    tokens = sum(f["windows"] * (f["seq_len"] - 1) for f in of["evaluation"].values())
    whole = {row["pruned"]: row["achieved"] for row in found["rows"] if row["method"] == "reap"}
    achieved = ", ".join(f"{100 * whole[share]:g}" for share in shares)
    note = (
        f"Increase of the loss in nats per token with half of a 95 % interval (paired); base loss "
        f"{found['base']['nll']:.3f}, {tokens:,} held-out tokens of four domains; bold: cannot be "
        f"told from the best. Calibration {of['calibration']['windows']} windows of "
        f"{of['calibration']['seq_len']} tokens. Of 16 experts a layer, methods of whole experts "
        f"remove {achieved} %. A name with @ or + has another allocation or router rule than its "
        "paper. "
    )
    notes = [note + measured_on(found, "python bench/compare.py")]
    for part in found.get("later", []):
        shown = [name for name in part["methods"] if only is None or name in only]
        if shown:
            where = measured_on(part, "python bench/compare.py")
            notes.append(f"Added later, {', '.join(shown)}: {where}")
    return "\n".join([*lines, "", *notes])


def learned() -> str:
    found = results("quality")
    rows = [row for row in found["rows"] if row["allocate"].startswith("learned")]
    rows += [r for r in found["rows"] if (r["method"], r["allocate"]) == ("fisher", "global")]
    lines = ["| | 20 % | 40 % | 60 % | 80 % |", "|---|---|---|---|---|"]
    for row in rows:
        name = row["allocate"].removeprefix("learned: ").replace("global", "the global cut")
        values = [f"{row['nll_increase'][s]:.3f}" for s in SHARES]
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    return "\n".join(lines)


def family_rows(recovered: bool) -> dict[str, dict[str, list[dict]]]:
    """Rows of results/family.json by model and recipe, one a seed."""
    grouped: dict[str, dict[str, list[dict]]] = {}
    for row in results("family")["rows"]:
        if row["model"] in MEASURED_WHOLE and row["recipe"].startswith("recovered: ") == recovered:
            recipe = row["recipe"].removeprefix("recovered: ")
            grouped.setdefault(row["model"], {}).setdefault(recipe, []).append(row)
    return dict(sorted(grouped.items(), reverse=True))


def family_table(recovered: bool) -> str:
    lines = []
    for model, recipes in family_rows(recovered).items():
        shares = list(next(iter(recipes.values()))[0]["nll_increase"])
        if lines:
            lines.append("")
        lines.append(f"| {model} | seeds | " + " | ".join(f"{float(s):.0%}" for s in shares) + " |")
        lines.append("|" + "---|" * (len(shares) + 2))

        def mean(rows: list[dict], share: str) -> float:
            return sum(row["nll_increase"][share] for row in rows) / len(rows)

        for recipe, rows in sorted(recipes.items(), key=lambda item: mean(item[1], "0.5")):
            values = [f"{mean(rows, s):.4f}" for s in shares]
            lines.append(f"| {recipe} | {len(rows)} | " + " | ".join(values) + " |")
    found = results("family")
    note = (
        f"Mean over seeds of the loss increase; calibration {found['calibration_windows']} windows "
        f"of {found['seq_len']} tokens, drawn by the seed; held out "
        f"{found['held_out_windows_a_domain']} windows of each of four domains. "
    )
    what = "recovery" if recovered else "plans"
    shown = [
        r for recipes in family_rows(recovered).values() for rs in recipes.values() for r in rs
    ]
    told = measured_in_parts(found, shown, f"python bench/family.py {what} MODEL")
    return "\n".join([*lines, "", note + told])


def costs() -> str:
    found = results("observe")
    lines = [
        f"Observing {found['tokens']:,} tokens against a plain forward and backward of stock",
        "transformers over the same tokens (median of interleaved rounds; extra peak memory of the",
        "process beyond the loaded model):",
        "",
        "| model | " + " | ".join(next(iter(found["models"].values()))) + " |",
        "|---" * (1 + len(next(iter(found["models"].values())))) + "|",
    ]
    for name, variants in found["models"].items():
        cells = [
            f"x{v['ratio_to_plain']:.2f}, {v['extra_peak_bytes'] / 1e6:.0f} MB"
            for v in variants.values()
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", measured_on(found, "python bench/observe.py"), ""]
    found = results("export")
    peak = max(job["anonymous"] + job["mapped"] for job in found["jobs"].values())
    seconds = ", ".join(f"{name} {job['seconds']:.0f} s" for name, job in found["jobs"].items())
    lines += [
        f"Writing, reading back and comparing a checkpoint of "
        f"{found['checkpoint_bytes'] / 1e9:.2f} GB (largest shard "
        f"{found['largest_shard_bytes'] / 1e6:.0f} MB, a layer's experts "
        f"{found['layer_bytes'] / 1e6:.0f} MB): peak memory {peak / 1e6:.0f} MB beyond imports; "
        f"{seconds}.",
        "",
        measured_on(found, "python bench/export.py"),
    ]
    return "\n".join(lines)


def trust() -> str:
    streamed, kill, doctor = results("streaming"), results("kill"), results("doctor")
    jobs = dict(streamed["jobs"])
    whole = jobs.pop("compress in memory")
    peaks = ", ".join(f"{name} {gib(job['peak_bytes'])}" for name, job in jobs.items())
    lines = [
        "| | |",
        "|---|---|",
        f"| a checkpoint of {gib(streamed['checkpoint_bytes'])} with `--memory` "
        f"{gib(streamed['memory_bytes'])}: peak of the process | {peaks}; `compress` without "
        f"`--memory`, same widths: {gib(whole['peak_bytes'])} |",
    ]
    for name in ("compress", "recover"):
        hits = ", ".join(f"{stage} {count}" for stage, count in kill[name]["hit"].items())
        lines.append(
            f"| `{name}` killed (-9) at {kill['kills']} moments and started again: equal to the "
            f"unbroken run | {kill[name]['equal']} of {kill['kills']} ({hits}) |"
        )
    rows = [(m, j, row) for m, jobs in doctor["models"].items() for j, row in jobs.items()]
    within = sum(abs(row["memory"]["off"]) <= 0.25 for _, _, row in rows)
    worst = max(rows, key=lambda found: abs(found[2]["memory"]["off"]))
    lines.append(
        f"| `doctor`: memory expected within 25 % of what was measured, "
        f"{len(doctor['models'])} models | {within} of {len(rows)} jobs; furthest "
        f"{worst[2]['memory']['off']:+.0%} ({worst[1]}, {worst[0]}); disk exact: "
        f"{'yes' if doctor['disk_exact'] else 'no'} |"
    )
    looks = results("glance")
    for name, row in looks["models"].items():
        what = "" if name == "tiny" else f", {looks['tensors']:,} tensors"
        lines.append(
            f"| `doctor {name}`{what}: until it has said what the model is and what jobs take at "
            f"least; until the end | "
            f"{row['first_seconds']:.2f} s ({row['first_cpu_seconds']:.2f} s of the processor); "
            f"{row['seconds']:.1f} s ({row['cpu_seconds']:.1f} s) |"
        )
    commands = ("streaming", "kill", "doctor", "glance")
    notes = [measured_on(results(name), f"python bench/{name}.py") for name in commands]
    return "\n".join([*lines, "", *notes])


def gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"


def filled(text: str, tables: dict[str, Callable[[], str]]) -> str:
    for name, table in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        body = table()
        text, count = re.subn(
            pattern, lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text, flags=re.DOTALL
        )
        assert count == 1, f"no block for the table {name}"
    return text


def main() -> None:
    for page, tables in PAGES.items():
        before = page.read_text()
        after = filled(before, tables)
        if "--check" not in sys.argv:
            page.write_text(after)
        elif before != after:
            sys.exit(f"{page.name} is not what the results say: run python bench/tables.py")


PAGES = {
    HERE.parent / "README.md": {
        "methods": lambda: methods(SHORT),
        "plans": lambda: family_table(recovered=False),
        "recovered": lambda: family_table(recovered=True),
        "costs": costs,
        "trust": trust,
    },
    HERE.parent / "docs" / "log.md": {
        "learned": learned,
        "pairs": pairs,
        "redundancy": redundancy,
        "ablations": ablations,
    },
    HERE.parent / "docs" / "premoe.md": {
        "premoe": premoe_loss,
        "premoe-retrieval": premoe_retrieval,
        "premoe-scores": premoe_scores,
        "premoe-bytes": premoe_bytes,
    },
    HERE.parent / "docs" / "compare.md": {"methods": methods},
    HERE.parent / "docs" / "serving.md": {
        "serve": serve,
        "vllm": vllm,
        "vllm-architectures": vllm_architectures,
    },
    HERE.parent / "docs" / "kernels.md": {
        "kernels_gpu": kernels_gpu,
        **{
            name: partial(table, name)
            for table in (kernels, model_speed)
            for name in (table.__name__, f"{table.__name__}-avx2")
        },
    },
}

if __name__ == "__main__":
    main()
