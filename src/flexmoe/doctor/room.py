"""What is free, which needs are more than that, and what helps."""

from __future__ import annotations

from flexmoe.doctor.found import Diagnosis, Need
from flexmoe.reports.report import size

FEWER = "lower --batch-size or --seq-len"
SMALLER_STEPS = f"{FEWER}, or use --micro-batch 1 --checkpointing"
BY_LAYER = "go layer by layer with --memory"
# what helps when the weights alone do not fit, and when all together does not
HELP = {
    "compress": (
        f"{BY_LAYER}, or use a machine with more, or several devices with --shard",
        FEWER,
    ),
    "recover --mode closed-form": (f"{BY_LAYER}, or use a machine with more", FEWER),
    "recover --mode lora": (
        "recover with --mode closed-form --memory, or full on several devices with --shard",
        SMALLER_STEPS,
    ),
}
TRAINED = (
    "recover with --mode closed-form --memory, or on several devices with --shard",
    SMALLER_STEPS,
)


def note_what_does_not_fit(found: Diagnosis) -> None:
    """Add to ``problems`` and ``warnings`` what its needs say, where free memory is known."""
    for need in found.needs if found.memory_free else ():
        problems, warnings = what_does_not_fit(
            need, found.device, found.memory_free, found.disk_free
        )
        found.problems += problems
        found.warnings += warnings


def what_does_not_fit(
    need: Need, device: str, memory: int, disk: int
) -> tuple[list[str], list[str]]:
    """Problems and warnings, for bytes that are free on a device and on the disk: `compress` that
    cannot hold the weights or write the family is a problem, everything else may still go well
    elsewhere or with other settings."""
    where = "memory" if device == "cpu" else f"memory of {device}"
    hopeless: list[str] = []
    doubtful: list[str] = []
    compressing = need.job == "compress"
    too_heavy, too_large = HELP.get(need.job, TRAINED)
    weights, free = need.parts.get("weights", 0), f"{size(memory)} are free"
    if weights > memory:
        text = f"{need.job}: the weights alone take {size(weights)} of {where}, {free}: {too_heavy}"
        (hopeless if compressing else doubtful).append(text)
    elif need.memory > memory:
        text = f"{need.job} takes about {size(need.memory)} of {where}, {free}: {too_large}"
        doubtful.append(text)
    if need.disk + need.scratch > disk:
        text = f"{need.job} writes {size(need.disk + need.scratch)}, the disk has {size(disk)} free"
        (hopeless if compressing else doubtful).append(text)
    return hopeless, doubtful
