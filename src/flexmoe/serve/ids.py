"""Model ids: ``NAME`` is the default budget, ``NAME:40`` the one pruned by 40 %, ``NAME:math`` the
model with the experts that a task needs, ``NAME:auto`` with those of the task that is found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.errors import FlexmoeError, did_you_mean

AUTO = "auto"


def label(share: float) -> str:
    """A pruned share as ids, routes and metrics name it: 0.4 is ``40``, 0.125 is ``12.5``."""
    return f"{100 * share:g}"


@dataclass(frozen=True)
class Budgets:
    """The budgets that are served under ``name``: their pruned ``shares``, rich to poor; and the
    ``tasks`` beside them.

    A model that is not pruned at all has one id, its name.
    """

    name: str
    shares: tuple[float, ...]
    tasks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # a name goes into JSON and URLs as it is, and is looked for there; a colon ends it
        if not self.name or any(not "!" <= c <= "~" or c in '"\\:' for c in self.name):
            raise FlexmoeError(
                f"model name '{self.name}': expected letters, digits and signs without spaces, "
                "quotes or colons (a budget follows one), such as qwen3 (--name)"
            )
        if not self.shares or list(self.shares) != sorted(set(self.shares)):
            raise FlexmoeError(f"budgets must rise, found {list(self.shares)}")
        for task in self.tasks:
            if task in (*self.labels, AUTO) or not task.isascii():
                raise FlexmoeError(
                    f"task '{task}' cannot be served under its name: it must not be '{AUTO}' or a "
                    "budget, and of ASCII letters"
                )

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels of the shares, rich to poor."""
        return tuple(label(share) for share in self.shares)

    @property
    def rows(self) -> tuple[str, ...]:
        """What a request can run at: labels of budgets, then tasks."""
        return self.labels + self.tasks

    def id(self, row: str) -> str:
        """The model id of a label or task."""
        return self.name if self.shares == (0.0,) and row in self.labels else f"{self.name}:{row}"

    @property
    def ids(self) -> tuple[str, ...]:
        """Every model id, the one of the default first."""
        auto = (AUTO,) if self.tasks else ()
        return tuple(dict.fromkeys((self.name, *map(self.id, self.rows + auto))))

    def find(self, model_id: str) -> str | None:
        """The label or task that ``model_id`` names, or `AUTO`; None for the default. A
        `FlexmoeError` lists the ids where it is none of them."""
        if model_id == self.name:
            return None
        if model_id not in self.ids:
            name, _, budget = model_id.rpartition(":")
            near = nearest(budget, self.labels) if name == self.name else None
            if near is None:
                raise did_you_mean(model_id, self.ids, "model")
            raise FlexmoeError(
                f"unknown model '{model_id}'. Did you mean '{self.id(near)}'? "
                f"Known: {', '.join(sorted(self.ids))}"
            )
        return model_id.removeprefix(f"{self.name}:")

    def share(self, budget: str) -> float:
        """The share of a label; a `FlexmoeError` lists the labels where it is none of them."""
        if budget not in self.labels:
            raise unknown_budget(budget, self.labels)
        return self.shares[self.labels.index(budget)]


def unknown_budget(found: str, labels: Sequence[str]) -> FlexmoeError:
    """The error for a budget that is not served."""
    near = nearest(found, labels)
    hint = "" if near is None else f" Did you mean '{near}'?"
    return FlexmoeError(
        f"unknown budget '{found}' (percent pruned).{hint} Known: {', '.join(labels)}"
    )


def nearest(found: str, labels: Sequence[str]) -> str | None:
    """Budgets are numbers: the label nearest in value, a share below 1 taken for what it says; None
    for what is no number."""
    try:
        wanted = float(found)
    except ValueError:
        return None
    percent = 100 * wanted if 0 < wanted < 1 else wanted
    return min(labels, key=lambda b: abs(float(b) - percent))
