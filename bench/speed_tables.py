"""Tables of docs/serving.md and docs/kernels.md, see tables.py."""

from __future__ import annotations

import json
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
PARTS = {
    "without_switching": "no switching",
    "with_switching": "default switched by hand",
    "with_policy": "policy alone",
}
BETWEEN = ("80 %", "60 %", "40 %")


def results(name: str) -> dict:
    return json.loads((RESULTS / f"{name}.json").read_text())


def measured_on(found: dict, command: str) -> str:
    """Command, hardware, versions, date and commit of a result."""
    where = found["environment"]
    cores = f"{where['cores']} core" + "s" * (where["cores"] != 1)
    engine = f", vLLM {found['vllm']}" if found.get("vllm") else ""
    return (
        f"`{command}`; {cores} of {where['cpu']}, torch {where['torch']}, "
        f"transformers {where['transformers']}{engine}, {where['date']}, commit {where['commit']}."
    )


def measured_in_parts(found: dict, rows: list[dict], command: str) -> str:
    """The same for rows that were measured one by one."""
    where, dates = found["environment"], sorted({row["date"] for row in rows})
    cpus = " or ".join(sorted({row["cpu"] for row in rows}))
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    return (
        f"`{command}`; 1 core of {cpus}, torch {where['torch']}, transformers "
        f"{where['transformers']}, {when}; each row of the results has its own commit."
    )


def serve() -> str:
    """Load on the two engines while the default budget moves."""
    head = "| engine | load | requests | failed | other answer than alone | tokens/s |"
    lines, notes = [head, "|---|---|---|---|---|---|"], []
    for path in sorted(RESULTS.glob("serve-*.json")):
        found = json.loads(path.read_text())
        for part, name in PARTS.items():
            row = found[part]
            lines.append(
                f"| {found['engine']} | {name} | {row['requests']:,} | {row['failed']} | "
                f"{row['different']} | {row['tokens_per_second']:,.0f} |"
            )
        switches, policy = found["switches"], found["policy"]
        ttft, tpot = policy["ttft_ms"], policy["tpot_ms"]
        inside, outside = switches["in_server"], switches["round_trip"]
        notes.append(
            f"{found['engine']}: {switches['count']} switches, in the server "
            f"{inside['median_ms']:.3f} ms (p99 {inside['p99_ms']:.3f}), over HTTP under load "
            f"{outside['median_ms']:.0f} ms (p99 {outside['p99_ms']:.0f}); the policy (TTFT "
            f"{ttft:g} ms, TPOT {tpot:g} ms) moved {policy['moves']} times. "
            + measured_on(found, found["command"])
        )
    return "\n".join([*lines, "", *notes])


def vllm() -> str:
    """Speed of every budget in vLLM against stock vLLM."""
    path = RESULTS / "vllm.json"
    found = json.loads(path.read_text())
    batches = sorted({row["batch"] for row in found["rows"]})
    head = ["engine", "budget", "experts"]
    head += [f"prefill {batch}" for batch in batches] + [f"decode {batch}" for batch in batches]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    by_label: dict[tuple[str, str | None], dict[int, dict]] = {}
    for row in found["rows"]:
        by_label.setdefault((row["engine"], row["budget"]), {})[row["batch"]] = row
    stock = next(iter(by_label.values()))
    for (engine, budget), rows in by_label.items():
        cells = [
            engine,
            f"{budget} %" if budget else "",
            f"{rows[batches[0]]['expert_bytes'] / 2**20:.0f} MiB",
        ]
        for key in ("prefill_ms", "decode_ms"):
            for batch in batches:
                value = rows[batch][key]
                cells.append(f"{value:.1f} (x{value / stock[batch][key]:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    note = (
        f"{found['model']}; milliseconds for {found['prompt_tokens']} prompt tokens a sequence and "
        f"for one more token, batches of {' and '.join(map(str, batches))} sequences; in brackets "
        f"against stock vLLM; medians of {found['repeats']} repeats, rounds: {found['rounds']}. "
    )
    return "\n".join([*lines, "", note + measured_on(found, "python bench/vllm_speed.py")])


def kernels(name: str = "kernels") -> str:
    """Ragged experts on the CPU against what else computes experts."""
    found = results(name)
    names = list(found["rows"][0]["seconds"])
    peers, more = names[: names.index("100 %")], [b for b in BETWEEN if b in names]
    short = [name.removeprefix("transformers ").removesuffix(" cpu_fused_moe") for name in peers]
    lines = [
        "| E/H/I/top-k | dtype | T | " + " | ".join(short) + " | flexmoe 100 % | of fastest | "
        "50 % | of fastest | x roofline | "
        + ("fastest peer over 80, 60, 40 % | " if more else "")
        + "three budgets | mixed |",
        "|" + "---|" * (10 + len(peers) + bool(more)),
    ]
    for row in found["rows"]:
        seconds, work = row["seconds"], row["work"]["50 % ragged"]
        fastest = min(seconds[name] for name in peers)
        whole, half = seconds["100 %"], seconds["50 % ragged"]
        cells = ["/".join(map(str, row["shape"].values())), row["dtype"], str(row["T"])]
        cells += [f"{seconds[name] * 1e3:.2f}" for name in peers]
        cells += [f"{whole * 1e3:.2f}", f"{whole / fastest:.2f}"]
        cells += [f"{half * 1e3:.2f}", f"{half / fastest:.2f}", f"{half / work['roof_s']:.2f}"]
        cells += [", ".join(f"x{fastest / seconds[b]:.2f}" for b in more)] if more else []
        mixed = seconds["three budgets"] / seconds["three batches"]
        cells += [f"{seconds['three budgets'] * 1e3:.2f}", f"{mixed:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    machine = found["machine"]
    rates = ", ".join(f"{n} {r / 1e9:.0f} GFLOP/s" for n, r in machine["flop_per_s"].items())
    limits = f"{rates}, {machine['bytes_per_s'] / 1e9:.1f} GB/s"
    if all("machine" in row for row in found["rows"]):
        reads = sorted(row["machine"]["bytes_per_s"] / 1e9 for row in found["rows"])
        flops = {
            dtype: [
                row["machine"]["flop_per_s"] / 1e9 for row in found["rows"] if row["dtype"] == dtype
            ]
            for dtype in machine["flop_per_s"]
        }
        ranges = ", ".join(f"{n} {min(r):.0f} to {max(r):.0f} GFLOP/s" for n, r in flops.items())
        limits = (
            f"medians of the same rounds: {ranges}, {reads[0]:.1f} to {reads[-1]:.1f} GB/s; "
            f"the best of a first look: {limits}"
        )
    note = (
        f"Milliseconds, {found['clock']}, medians of {found.get('rounds', 'interleaved rounds')} "
        "(once where a call takes longer than 2 s). 50 %: widths of 10 to 90 % of all channels, "
        "mean 50 %; "
        + ("80, 60 and 40 %: as far around their mean as fits; " if more else "")
        + "x roofline: over what the best measured arithmetic (products of square matrices) or "
        "reads of memory (of a GiB, in products of a matrix and a vector) take for the work left "
        f"({limits}); mixed: one batch of three budgets over a batch for each. Switching 48 layers "
        f"of 128 experts: {found['switch_s'] * 1e3:.2f} ms. "
    )
    return "\n".join([*lines, "", note + measured_on(found, "python bench/kernel_speed.py")])


def kernels_gpu() -> str:
    """Ragged experts on a GPU against what else computes experts."""
    found = results("kernels_gpu")
    peers = ("torch grouped_mm", "vLLM")  # --vllm
    lines = [
        "| layer | T | grouped_mm | vLLM | flexmoe 100 % | of fastest | of limit | 50 % | "
        "of fastest | of limit | fastest peer over 80, 60, 40 % | three budgets | mixed |",
        "|" + "---|" * 13,
    ]
    for row in found["rows"]:
        seconds, roof_s = row["seconds"], row["roof_s"]
        fastest = min(seconds[name] for name in peers)
        cells = [row["layer"], str(row["T"])]
        cells += [f"{seconds[name] * 1e6:.0f}" for name in peers]
        for budget in ("100 %", "50 % ragged"):
            own = seconds[budget]
            cells += [f"{own * 1e6:.0f}", f"{own / fastest:.2f}", f"{roof_s[budget] / own:.2f}"]
        cells.append(", ".join(f"x{fastest / seconds[b]:.2f}" for b in BETWEEN))
        mixed = seconds["three budgets"] / seconds["three batches"]
        of_one = row["T"] == 1  # which has one budget
        cells += ["", ""] if of_one else [f"{seconds['three budgets'] * 1e6:.0f}", f"{mixed:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    machine, where = found["machine"], found["environment"]
    shapes = {row["layer"]: row["shape"].values() for row in found["rows"]}
    layers = ", ".join(f"{name} {'/'.join(map(str, shape))}" for name, shape in shapes.items())
    errors = [e for row in found["rows"] for name, e in row["error"].items() if name not in peers]
    others = [e for row in found["rows"] for name, e in row["error"].items() if name in peers]
    return "\n".join(
        [
            *lines,
            "",
            f"Microseconds, bfloat16, {found['clock']}; E/H/I/top-k: {layers}. vLLM: its kernel as "
            "tuned for this GPU, without its sorting of pairs. 50 %: widths of 10 to 90 % of all "
            "channels; 80, 60 and 40 %: as far around their mean as fits; at T = 1 every expert is "
            "drawn once. Of limit: what the best measured arithmetic or reads of memory take for "
            f"the work left ({machine['flop_per_s']['bfloat16'] / 1e12:.0f} TFLOP/s, "
            f"{machine['bytes_per_s'] / 1e12:.2f} TB/s), over the time. Mixed: one batch of three "
            "budgets over a batch for each. Error against float64, norm over norm: at most "
            f"{max(errors):.4f}, of the others {max(others):.4f}. Switching 48 layers of 128 "
            f"experts: {found['switch_s'] * 1e3:.2f} ms. `python bench/kernels_gpu.py --vllm "
            f"FOLDER`; {where['gpu']}, torch {where['torch']}, Triton {found['triton']}, "
            f"{where['date']}, commit {where['commit']}.",
        ]
    )


def model_speed(name: str = "model_speed") -> str:
    """Whole models at every budget against transformers on the unpruned one."""
    found = results(name)
    batches = sorted({row["batch"] for row in found["rows"]})
    head = ["model", "dtype", "engine", "pruned", "weights"]
    head += [f"TTFT {b}" for b in batches] + [f"TPOT {b}" for b in batches]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    groups: dict[tuple, dict[int, dict]] = {}
    for row in found["rows"]:
        key = (row["model"], row["dtype"], row["engine"], row["pruned"])
        groups.setdefault(key, {})[row["batch"]] = row
    for (model, dtype, engine, pruned), rows in groups.items():
        peers = [r for k, r in groups.items() if k[:2] == (model, dtype) and "transformers" in k[2]]
        size = next(iter(rows.values()))["weights"] / 2**20
        cells = [model, dtype, engine, f"{100 * pruned:g} %", f"{size:.0f} MiB"]
        for key in ("ttft_s", "tpot_s"):
            for b in batches:
                if b not in rows:
                    cells.append("")
                    continue
                fastest = min(peer[b][key] for peer in peers)
                cells.append(f"{rows[b][key] * 1e3:.1f} (x{rows[b][key] / fastest:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    command = f"python bench/model_speed.py --batch {','.join(map(str, batches))}"
    note = (
        f"Milliseconds, {found['clock']}: TTFT for prompts of {found['prompt']} tokens and the "
        f"first token, TPOT for each of {found['new']} further ones, at batches of "
        f"{', '.join(map(str, batches))} sequences; in brackets against the fastest of "
        f"transformers' functions on the unpruned model; medians of {found['repeats']} rounds. "
    )
    return "\n".join([*lines, "", note + measured_on(found, command)])


def vllm_architectures() -> str:
    """Which architectures vLLM serves with flexmoe, and how."""
    found = json.loads((RESULTS / "vllm_architectures.json").read_text())
    prompts = found["prompts"]

    def cell(of: dict) -> str:
        if of["equal"] is None:
            return {"no class of its own": "no class"}.get(of["said"], "no")
        stock = f"; stock vLLM {of['stock']} of {prompts}" if "stock" in of else ""
        return f"{of['equal']} of {prompts}{stock}"

    lines = ["| model_type | in the file | vLLM's own class | `--model-impl transformers` |"]
    lines.append("|---|---|---|---|")
    neither = []
    for name, row in found["rows"].items():
        if not row["native"]["equal"] and not row["transformers"]["equal"]:
            neither.append(name)
            continue
        layout = "fused" if row["fused"] else "each expert"
        lines.append(f"| {name} | {layout} | {cell(row['native'])} | {cell(row['transformers'])} |")
    note = (
        f"Prompts of {prompts} whose {found['new_tokens']} greedy float32 tokens, four budgets in "
        "one batch, equal those of transformers with the pruned channels masked; random models. "
        "Where they do not, stock vLLM with the unpruned model against transformers. Neither way "
        f"on this machine: {', '.join(neither)} (what was said is in the results). "
    )
    told = measured_on(found, "python bench/vllm_architectures.py")
    return "\n".join([*lines, "", note + told])
