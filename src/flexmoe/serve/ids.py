"""Model ids of budgets: ``NAME`` is the default budget, ``NAME:40`` the one pruned by 40 %."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.errors import FlexmoeError, did_you_mean


def label(share: float) -> str:
    """A pruned share as ids, routes and metrics name it: 0.4 is ``40``, 0.125 is ``12.5``."""
    return f"{100 * share:g}"


@dataclass(frozen=True)
class Budgets:
    """The budgets that are served under ``name``: their pruned ``shares``, rich to poor.

    A model that is not pruned at all has one id, its name.
    """

    name: str
    shares: tuple[float, ...]

    def __post_init__(self) -> None:
        # a name goes into JSON and URLs as it is, and is looked for there
        if not self.name or any(not "!" <= c <= "~" or c in '"\\' for c in self.name):
            raise FlexmoeError(
                f"model name '{self.name}': expected letters, digits and signs without spaces or "
                "quotes, such as qwen3 (--name)"
            )
        if not self.shares or list(self.shares) != sorted(set(self.shares)):
            raise FlexmoeError(f"budgets must rise, found {list(self.shares)}")

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the shares, rich to poor."""
        return tuple(label(share) for share in self.shares)

    def id(self, budget: str) -> str:
        """The model id of a label."""
        return self.name if self.shares == (0.0,) else f"{self.name}:{budget}"

    @property
    def ids(self) -> tuple[str, ...]:
        """Every model id, the one of the default first."""
        return tuple(dict.fromkeys((self.name, *map(self.id, self.labels))))

    def find(self, model_id: str) -> float | None:
        """The share that ``model_id`` names, None for the default; a `FlexmoeError` lists the ids
        where it is none of them."""
        if model_id == self.name:
            return None
        if model_id not in self.ids:
            raise did_you_mean(model_id, self.ids, "model")
        return self.shares[self.ids.index(model_id) - 1]

    def share(self, budget: str) -> float:
        """The share of a label; a `FlexmoeError` lists the labels where it is none of them."""
        if budget not in self.labels:
            raise unknown_budget(budget, self.labels)
        return self.shares[self.labels.index(budget)]


def unknown_budget(found: str, labels: Sequence[str]) -> FlexmoeError:
    """The error for a budget that is not served. Budgets are numbers: the nearest is the nearest
    in value, and a share below 1 is taken for what it says."""
    hint, known = "", ", ".join(labels)
    try:
        wanted = float(found)
    except ValueError:
        pass
    else:
        percent = 100 * wanted if 0 < wanted < 1 else wanted
        hint = f" Did you mean '{min(labels, key=lambda b: abs(float(b) - percent))}'?"
    return FlexmoeError(f"unknown budget '{found}' (percent pruned).{hint} Known: {known}")
