"""Which member of a family fits what is wanted: a quality to keep, bytes, parameters."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flexmoe.checkpoint import Checkpoint
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.evaluation.curve import command, load_curve, stale
from flexmoe.evaluation.quality import QUALITIES, kept
from flexmoe.evaluation.records import Curve, Point
from flexmoe.family import find_folder
from flexmoe.plan import Member, Plan, read_manifest
from flexmoe.progress import Track, silent
from flexmoe.reports.report import count, size
from flexmoe.routing.rules import export_options

OPTIONS: dict[str, tuple[str, ...]] = {  # of flexmoe eval, to measure a quality
    "loss": (),
    "pairs": ("--pairs FILE",),
    "tasks": ("--tasks NAMES",),
}


@dataclass(frozen=True)
class Wanted:
    """What a member must do, all of it.

    ``keep``: keep at least this share of the base's quality: ``by`` loss, exp(-(loss increase)),
    by pairs, the ratio of the accuracies, or by tasks, the lowest ratio. ``memory``: weigh at most
    these bytes. ``params``: have at most this many parameters, all of them counted.
    """

    keep: float | None = None
    by: str = "loss"
    memory: int | None = None
    params: int | None = None

    def __post_init__(self) -> None:
        if self.by not in QUALITIES:
            raise did_you_mean(self.by, QUALITIES, "quality")
        if self.keep is None and self.memory is None and self.params is None:
            raise FlexmoeError(
                "nothing to pick by: give --keep 0.95, --memory 24GiB or --params 20B"
            )
        if self.keep is None and self.by != "loss":
            raise FlexmoeError(f"--by {self.by} has no effect without --keep")
        if self.keep is not None and not 0 < self.keep <= 1:
            raise FlexmoeError(
                f"--keep {self.keep:g}: expected a share above 0 and at most 1 (95 % is 0.95)"
            )


@dataclass(frozen=True)
class Candidate:
    """A member of the family: its figures, all its parameters, and its quality as measured (None:
    it was not)."""

    member: Member
    parameters: int
    quality: Point | None = None

    def kept(self, by: str) -> float | None:
        """The share of the base's quality it keeps, see `quality.kept`; None where that
        was not measured."""
        found = None if self.quality is None else kept(self.quality.model_dump(), by)
        return None if found is None else found[0]

    def keeps(self, wanted: Wanted) -> bool:
        """Whether it was measured to keep as much as is ``wanted``."""
        share = self.kept(wanted.by)
        return share is not None and wanted.keep is not None and share >= wanted.keep


@dataclass(frozen=True)
class Picked:
    """The member that fits. ``curve`` is where its quality is from, if that was measured;
    ``export`` the command that writes it and its ``layout`` (None for budget 0, which is the model
    itself); ``notes`` what to know about the choice."""

    candidate: Candidate
    curve: Curve | None
    export: str | None
    layout: str | None
    notes: tuple[str, ...] = ()


def fitting(candidates: Sequence[Candidate], wanted: Wanted) -> list[Candidate]:
    """Those of ``candidates`` (rich to poor) within the memory and parameters ``wanted``; a
    `FlexmoeError` names the smallest where there are none."""
    fit = [
        c
        for c in candidates
        if (wanted.memory is None or c.member.bytes <= wanted.memory)
        and (wanted.params is None or c.parameters <= wanted.params)
    ]
    if not fit:
        raise FlexmoeError(
            f"no member fits {_limits(wanted)}: the smallest is {_describe(candidates[-1])}. Allow "
            "that much, or compress again with budgets that go further (--pruned)"
        )
    return fit


def choose(candidates: Sequence[Candidate], wanted: Wanted) -> Candidate:
    """The member that does all that is ``wanted``, from ``candidates`` rich to poor.

    By memory or parameters the richest that fits; by quality alone the poorest that keeps it. A
    `FlexmoeError` says what comes nearest.
    """
    fit = fitting(candidates, wanted)
    if wanted.keep is None:
        return fit[0]
    good = [c for c in fit if c.keeps(wanted)]
    if good:
        return good[-1] if wanted.memory is None and wanted.params is None else good[0]
    measured = [c for c in fit if c.kept(wanted.by) is not None]
    if not measured:
        raise FlexmoeError(
            f"no member within {_limits(wanted)} was measured, the first is {_describe(fit[0])}: "
            "measure all budgets (flexmoe eval FAMILY --save)"
        )
    best = max(measured, key=lambda c: c.kept(wanted.by) or 0.0)
    enough = [c for c in candidates if c.keeps(wanted)]
    needs = f"it takes {_describe(enough[-1])}" if enough else "no measured member does"
    raise FlexmoeError(
        f"no member within {_limits(wanted)} keeps {wanted.keep:g} of the {QUALITIES[wanted.by]}: "
        f"{needs}. The best within is {_describe(best)}, it keeps {best.kept(wanted.by):.4g}. "
        "Allow more or keep less"
    )


def _limits(wanted: Wanted) -> str:
    limits = [] if wanted.memory is None else [f"{wanted.memory:,} bytes"]
    limits += [] if wanted.params is None else [f"{wanted.params:,} parameters"]
    return " and ".join(limits) or "the family"


def _describe(candidate: Candidate) -> str:
    member = candidate.member
    return (
        f"the one at {100 * member.pruned:g} % pruned ({size(member.bytes)}: {member.bytes:,} "
        f"bytes; {count(candidate.parameters)} parameters)"
    )


def pick(path: str | Path, wanted: Wanted, *, track: Track = silent) -> Picked:
    """The member of the family or plan at ``path`` that does what is ``wanted``.

    Its budgets are the choice. Quality is that of the saved curve; by memory and parameters none
    is needed. Raises `FlexmoeError` where nothing fits, or where ``keep`` asks for a quality that
    was not measured or is of other weights (all weights are read to know).
    """
    folder = find_folder(path)
    plan = Plan.load(folder)
    curve, notes = load_curve(folder), []
    measure = command(path, *OPTIONS[wanted.by], again=curve)
    measured = {point.pruned: point for point in curve.budgets} if curve else {}
    other = _other_parameters(folder, plan)
    candidates = [
        Candidate(member, other + member.routed_parameters, measured.get(member.pruned))
        for member in map(plan.member, plan.budgets)
    ]
    fitting(candidates, wanted)  # the slow part comes next
    missing = [c.member.pruned for c in candidates if c.kept(wanted.by) is None]
    if wanted.keep is not None:
        if curve is None:
            raise FlexmoeError(f"'{path}' has no saved curve to see what is kept: run {measure}")
        if len(missing) == len(candidates):
            raise FlexmoeError(f"the curve saved in '{path}' has no {wanted.by}: run {measure}")
        if missing:
            shares = ", ".join(f"{share:g}" for share in missing)
            notes.append(f"not measured and so left out: {shares}; measure all with {measure}")
    if curve is not None and (reason := stale(curve, folder, track)):
        reason = f"{reason} on {curve.date[:10]}: measure again with {measure}"
        if wanted.keep is not None:
            raise FlexmoeError(reason)
        curve, notes = None, [f"no quality: {reason}"]
        candidates = [replace(candidate, quality=None) for candidate in candidates]
    chosen = choose(candidates, wanted)
    export = layout = None
    if share := chosen.member.pruned:
        options = export_options(plan, share)
        export, layout = _export_command(path, share, options), options.split()[1]
    return Picked(chosen, curve, export, layout, tuple(notes))


def _other_parameters(folder: Path, plan: Plan) -> int:
    """Parameters that are not of routed experts: from the weights in ``folder``, or of a plan
    alone from their bytes (as if all were of the experts' dtype)."""
    if read_manifest(folder).ranked:
        shapes = (info.shape for info in Checkpoint(folder).tensors.values())
        return sum(map(math.prod, shapes)) - plan.routed_parameters
    return plan.bytes_full // plan.bytes_per_parameter - plan.routed_parameters


def _export_command(path: str | Path, pruned: float, options: str) -> str:
    out = f"{str(path).rstrip('/')}-{100 * pruned:g}"
    return (
        f"flexmoe export {shlex.quote(str(path))} --pruned {pruned:g} {options} "
        f"-o {shlex.quote(out)}"
    )
