"""Tables of docs/premoe.md, see tables.py."""

from __future__ import annotations

from collections.abc import Callable

from speed_tables import measured_on, results


def premoe_loss() -> str:
    found = results("premoe")
    members = found["loss"]["members"]
    domains = [name for name in members["full"] if name != "mean"]
    lines = [
        f"| experts that stay, {found['keep']:.0%} of every layer | {' | '.join(domains)} | mean |",
        "|---" * (len(domains) + 2) + "|",
    ]

    def row(name: str, cells: Callable[[str], str]) -> None:
        lines.append(f"| {name} | " + " | ".join(cells(of) for of in (*domains, "mean")) + " |")

    def increase(name: str) -> Callable[[str], str]:
        return lambda of: f"{members[name][of]['increase']:.3f}"

    row("all: the loss", lambda of: f"{members['full'][of]['nll']:.3f}")
    for domain in domains:
        row(f"specialist: {domain}", increase(domain))
    row("generalist of the four", increase("generalist"))
    mixed = "generalist, scores over their sum"
    row(mixed, increase(mixed))
    row("the pattern that retrieval finds", increase("retrieved"))
    drawn = [name for name in members if name.startswith("random")]
    row(
        f"drawn at random (mean of {len(drawn)})",
        lambda of: f"{sum(members[name][of]['increase'] for name in drawn) / len(drawn):.3f}",
    )
    widest = max(
        max(cell["increase"] - cell["increase_interval"][0] for cell in members[name].values())
        for name in members
        if name != "full"
    )
    note = (
        f"Increase of the held-out loss, nats per token, 95 % intervals within {widest:.2f}; "
        f"{found['windows_a_domain']} windows of {found['seq_len']} tokens a domain, each after "
        f"the {found['prompt']} tokens that retrieval reads; patterns by {found['method']} from "
        f"{found['calibration_windows']} windows of each domain's training text. "
    )
    return "\n".join([*lines, "", note + measured_on(found, "python bench/premoe.py")])


def premoe_retrieval() -> str:
    found = results("premoe")["retrieval"]
    lines = [
        "| tokens of the prompt | right | within reach | unknown without its pattern | "
        "right, TCESS | unknown, TCESS |",
        "|---" * 6 + "|",
    ]

    def share(row: dict, name: str) -> str:
        low, high = row[f"{name} interval"]
        return f"{row[name]:.0%} ({low:.0%} to {high:.0%})"

    ours, theirs = found["mean logits"], found["TCESS (v1)"]
    for tokens, rows in ours.items():
        cells = [share(rows["all"], name) for name in ("right", "known", "unknown without it")]
        other = theirs[tokens]["all"]
        cells += [f"{other['right']:.0%}", f"{other['unknown without it']:.0%}"]
        lines.append(f"| {tokens} | " + " | ".join(cells) + " |")
    longest = list(ours.values())[-1]
    by_domain = ", ".join(
        f"{name} {row['right']:.0%} and {row['unknown without it']:.0%}"
        for name, row in longest.items()
        if name != "all"
    )
    note = (
        f"{longest['all']['n']} held-out prompts of four domains; in brackets 95 % intervals. "
        f"Right and unknown at {list(ours)[-1]} tokens by domain: {by_domain}."
    )
    return "\n".join([*lines, "", note])


def premoe_scores() -> str:
    rows = results("premoe")["scores"]
    lines = ["| score | own specialist | generalist |", "|---|---|---|"]
    for name, row in sorted(rows.items(), key=lambda item: item[1]["own"]):
        lines.append(f"| {name} | {row['own']:.3f} | {row['generalist']:.3f} |")
    return "\n".join(lines)


def premoe_bytes() -> str:
    found = results("premoe")
    tiny, large = found["bytes"], found["large"]

    def mb(size: float) -> str:
        return f"{size / 1e6:.{1 if size < 1e7 else 0}f} MB"

    reads = [row["read"] for row in tiny.values() if "read" in row]
    shape = ", ".join(f"{number} {name}" for name, number in large["shape"].items())
    model, specialist = large["load the model"], large["load the specialist"]
    return "\n".join(
        [
            "| | shipped model | random model |",
            "|---|---|---|",
            f"| the model's tensors | {mb(tiny['full']['written'])} | "
            f"{mb(large['make']['bytes'])} |",
            f"| read to make a specialist | {mb(min(reads))} to {mb(max(reads))} | "
            f"{mb(large['specialise']['read'])} |",
            f"| written | {mb(tiny['generalist']['written'])} | "
            f"{mb(large['specialise']['written'])} |",
            f"| peak memory of making it | | {mb(large['specialise']['peak'])} |",
            f"| memory of the model, of the specialist, in float32 | | {mb(model['held'])}, "
            f"{mb(specialist['held'])} |",
            "",
            f"The random model has {shape.replace('_', '-')}; memory is beyond what the program "
            "takes, each job in a process of its own.",
        ]
    )
