"""What share of the base's quality a member keeps, and a gate for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexmoe.errors import FlexmoeError, did_you_mean

QUALITIES = {
    "loss": "likelihood per token",
    "pairs": "accuracy on minimal pairs",
    "tasks": "score on every task",
}
Kept = tuple[float, tuple[float, float] | None]


def kept(row: Mapping[str, Any], by: str) -> Kept | None:
    """The share of the base's quality that a measured member keeps, and its interval; None where
    that was not measured or there was nothing to keep.

    ``by`` loss: exp(-(loss increase)); pairs: the ratio of the accuracies; tasks: the lowest of
    the tasks' ratios, so that no task hides behind the others.
    """
    if by not in QUALITIES:
        raise did_you_mean(by, QUALITIES, "quality")
    if by == "loss":
        return (row["kept"], row["kept_interval"]) if row.get("kept") is not None else None
    found = [row["pairs"]] if by == "pairs" else list((row.get("tasks") or {}).values())
    if not found or any(of is None or of["ratio"] is None for of in found):
        return None
    lowest = min(found, key=lambda of: of["ratio"])
    return lowest["ratio"], lowest["ratio_interval"]


@dataclass(frozen=True)
class Verdict:
    """Of a gate: whether all members pass, and the text that says it."""

    passed: bool
    text: str


def check_gate(share: float, by: str) -> None:
    """`FlexmoeError` unless ``share`` is one and ``by`` a known quality."""
    if by not in QUALITIES:
        raise did_you_mean(by, QUALITIES, "quality")
    if not 0 < share <= 1:
        raise FlexmoeError(
            f"--min-recovery {share:g}: expected a share above 0 and at most 1 (95 % is 0.95)"
        )


def gate(members: Sequence[Mapping[str, Any]], share: float, by: str = "loss") -> Verdict:
    """Whether every one of ``members`` (see `evaluate.Measured`) keeps at least ``share``
    of the base's quality.

    The measured value decides, as in `pick`; the text gives its interval, and says so
    where a member that passes might not. What cannot be told does not pass.
    """
    check_gate(share, by)
    found = {row["pruned"]: kept(row, by) for row in members}
    if missing := [f"{p:g}" for p, of in found.items() if of is None]:
        return Verdict(
            False,
            f"the {QUALITIES[by]} kept at pruned {', '.join(missing)} cannot be told: the base "
            "scores nothing, or less is better there; use another --by",
        )
    known = {pruned: of for pruned, of in found.items() if of is not None}
    failed = [pruned for pruned, of in known.items() if not of[0] >= share]  # nan fails too
    passed = [pruned for pruned in known if pruned not in failed]
    unsure = [p for p in passed if (spread := known[p][1]) is not None and spread[0] < share]
    what = f"{share:.4g} of the {QUALITIES[by]}"
    if not failed:
        lines = [f"all measured budgets keep at least {what}"]
    else:
        lines = [f"these budgets keep less than {what}:"]
        lines += [f"  {_described(pruned, known[pruned])}" for pruned in failed]
        most = f"the one at {100 * max(passed):g} % pruned" if passed else "no measured budget"
        lines.append(f"the smallest that passes is {most}" if passed else f"{most} passes")
    for pruned in unsure:
        lines.append(f"not certain: {_described(pruned, known[pruned])}; more text narrows it")
    return Verdict(not failed, "\n".join(lines))


def _described(pruned: float, of: Kept) -> str:
    spread = "" if of[1] is None else f" ({of[1][0]:.4f} to {of[1][1]:.4f})"
    return f"{100 * pruned:g} % pruned keeps {of[0]:.4f}{spread}"
