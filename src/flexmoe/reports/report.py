"""Numbers for people, and as people give them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexmoe.errors import FlexmoeError

if TYPE_CHECKING:
    from flexmoe.plan import Member

Row = Mapping[str, Any]
BYTES = {"": 1} | {
    unit: base**power
    for base, units in ((1000, ("kb", "mb", "gb", "tb")), (1024, ("kib", "mib", "gib", "tib")))
    for power, unit in enumerate(units, 1)
}
COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def size(number: float) -> str:
    """Bytes for people: 4.6 MB."""
    return _scaled(number, (" B", " kB", " MB", " GB", " TB"))


def count(number: float) -> str:
    """A count for people: 1.57 M."""
    return _scaled(number, ("", " k", " M", " B"))


def _scaled(number: float, units: Sequence[str]) -> str:
    """Three digits, or all before the point, in the unit that suits; never an exponent."""
    *small, unit = units
    for smaller in small:
        if number < 999.5:  # above it three digits are 1000
            unit = smaller
            break
        number /= 1000
    return f"{number:,.0f}{unit}" if number >= 999.5 else f"{number:.3g}{unit}"


def parse_bytes(text: str) -> int:
    """``24GiB`` as bytes: a number alone, or with KB MB GB TB (1000) or KiB MiB GiB TiB (1024)."""
    return _number(text, BYTES, "--memory", "24GiB, 24GB or 500MB")


def parse_count(text: str) -> int:
    """``20B`` as a number of parameters: a number alone, or with K, M, B or T."""
    return _number(text, COUNTS, "--params", "20B, 1.5B or 300M")


def _number(text: str, units: Mapping[str, int], option: str, examples: str) -> int:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*", text.lower())
    number = float(found[1]) * units.get(found[2], 0) if found else 0.0
    if not 0 < number < math.inf:
        raise FlexmoeError(f"{option} '{text}': expected a number above 0 such as {examples}")
    return round(number)


def percent(share: float) -> str:
    """A share for people: 12.5%."""
    return f"{100 * share:.4g}%"


def member_row(member: Member) -> list[str]:
    """Pruned as asked for and exactly, routed and active parameters, size: a budget's figures."""
    return [
        percent(member.pruned),
        f"{member.achieved:.2%}",
        count(member.routed_parameters),
        count(member.active_parameters),
        size(member.bytes),
    ]


# --- What was measured --------------------------------------------------------------------------

FIGURES = ("pruned", "achieved", "routed_parameters", "active_parameters", "bytes")
LABELS = {  # all other names are as they are: of files, of tasks
    "files": "loss",
    "by_file": "by file",
    "nll": "loss",
    "increase": "loss increase",
    "kept": "likelihood kept",
    "margin_ratio": "margin ratio",
    "kl": "KL",
    "agreement": "same top-1",
}
MEASURES = (
    "KL: divergence of the predictions, nats per token; same top-1: how often the likeliest token "
    "is the same; in brackets 95 % intervals."
)
MAIN = ("accuracy", "share", "value")  # what a bare "interval" beside them is of


def measured_rows(points: Sequence[Row], skip: Sequence[str] = ()) -> dict[str, list[str]]:
    """All that was measured at each budget of a curve, a row a measure: of the points (as dicts)
    every number that is no size, with its interval where there is one. What ``skip`` names is
    left out."""
    flat = [_flat({k: v for k, v in p.items() if k not in (*FIGURES, *skip)}) for p in points]
    names = dict.fromkeys(name for of in flat for name in of)
    return {name: [of.get(name, "") for of in flat] for name in names}


def _flat(values: Row, path: str = "") -> dict[str, str]:
    found: dict[str, str] = {}
    for name, value in values.items():
        label = f"{path}{LABELS.get(name, name)}"
        if isinstance(value, Mapping):
            found |= _flat(value, f"{label}: ")
        elif isinstance(value, int | float | str):
            spread = values.get("interval" if name in MAIN else f"{name}_interval")
            found[label] = figure(value) + ranging(spread)
    return found


def figure(value: float | str) -> str:
    """A measured number with four digits; what is none as it is."""
    return f"{value:#.4g}".rstrip(".") if isinstance(value, float) else str(value)


def ranging(spread: Sequence[float] | None) -> str:
    """An interval behind its number; nothing where there is none or it is empty."""
    if spread is None or spread[0] == spread[1]:
        return ""
    return f" ({figure(spread[0])} to {figure(spread[1])})"
