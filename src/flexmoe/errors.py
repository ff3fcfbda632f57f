"""Errors a user can act on: what was found, what was expected, the nearest fix."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FlexmoeError(ValueError):
    """A mistake in what was asked; the command line shows its text and no traceback."""


def did_you_mean(found: str, known: Iterable[str], what: str) -> FlexmoeError:
    """The error for an unknown name, with the nearest known ones and the whole list."""
    known = sorted(known)
    near = difflib.get_close_matches(found, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return FlexmoeError(f"unknown {what} '{found}'.{hint} Known: {', '.join(known)}")
