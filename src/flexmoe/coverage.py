"""Coverage: how many calibration tokens the experts of every layer were routed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.evidence import Evidence
from flexmoe.statistics import THIN

WORST = 4  # layers that are named


@dataclass(frozen=True)
class Coverage:
    """One layer: of ``tokens`` tokens the expert with the fewest got ``least``, and so on;
    ``thin`` experts got fewer than `THIN`."""

    layer: int
    tokens: int
    experts: int
    least: int
    median: float
    most: int
    thin: tuple[int, ...]


def coverage(evidence: Evidence, source: str | None = None) -> list[Coverage]:
    """A row for every layer, of all sources together or of one of ``evidence.sources``."""
    chosen = evidence if source is None else evidence.only([source])
    rows = []
    for i, stats in chosen.mixed().items():
        count_E = stats["count_E"]
        rows.append(
            Coverage(
                layer=i,
                tokens=stats.tokens,
                experts=len(count_E),
                least=int(count_E.min()),
                median=float(count_E.quantile(0.5)),
                most=int(count_E.max()),
                thin=tuple((count_E < THIN).nonzero().flatten().tolist()),
            )
        )
    return rows


def in_short(rows: Sequence[Coverage]) -> tuple[str, bool]:
    """Two sentences about rows of `coverage`, and whether evidence is thin somewhere."""
    thin, experts = sum(len(row.thin) for row in rows), sum(row.experts for row in rows)
    text = (
        f"coverage: of {rows[0].tokens:,} tokens an expert saw {min(r.least for r in rows):,} to "
        f"{max(r.most for r in rows):,}; {thin} of {experts} experts ({thin / experts:.0%}) saw "
        f"fewer than {THIN}"
    )
    if not thin:
        return text, False
    worst = sorted((r for r in rows if r.thin), key=lambda r: (-len(r.thin), r.least))
    named = ", ".join(f"layer {r.layer}: {len(r.thin)}" for r in worst[:WORST])
    more = f" and {len(worst) - WORST} layers more" if len(worst) > WORST else ""
    return (
        f"{text} ({named}{more}): their order is a guess. Give more or broader text with --data "
        "and --samples.",
        True,
    )
