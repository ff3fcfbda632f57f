"""The specialists of a store side by side on one model in memory, one active at a time.

A pattern is a plan whose channels stay where they are, so all of them share the model's weights:
switching writes width tables, as between budgets, and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.family import attach, load_stock, set_budget
from flexmoe.plan import Member, Plan
from flexmoe.premoe.pattern import Pattern
from flexmoe.premoe.retrieval import Match, retrieve
from flexmoe.premoe.specialist import compile_plan
from flexmoe.premoe.store import FOLDER, Store, fingerprint_of


@dataclass(frozen=True)
class Specialists:
    """``model`` and its ``patterns``, each with its plan in ``plans`` by the task's name."""

    model: PreTrainedModel
    patterns: list[Pattern]
    plans: dict[str, Plan]

    def activate(self, task: str | None) -> Member:
        """Let the model compute with the experts of ``task`` alone, or with all (None)."""
        if task is None:
            return set_budget(self.model, 0.0)
        if task not in self.plans:
            raise did_you_mean(task, self.plans, "task")
        return activate(self.model, self.plans[task])

    def retrieve(self, ids: Tensor) -> Match:
        """The pattern that a prompt ``ids`` [t] needs."""
        return retrieve(self.model, self.patterns, ids)

    def adapt(self, ids: Tensor) -> Match:
        """Activate the pattern that a prompt ``ids`` [t] needs, or the full model where no stored
        task is near; the match says which, and how far away it is."""
        match = self.retrieve(ids)
        self.activate(match.task)
        return match


def activate(model: PreTrainedModel, plan: Plan) -> Member:
    """Let ``model`` compute with the experts that a plan of `compile_plan` keeps, and no others.

    Only width tables change. Returns the figures of what is active.
    """
    if plan.recipe.unit != "expert":
        raise FlexmoeError("this plan is of channels: open it with flexmoe.load")
    attach(model, plan, ranked=True)  # its channels stay where they are
    return set_budget(model, plan.budgets[-1])


def load(
    model: str | Path,
    *,
    keep: float,
    store: str | Path = FOLDER,
    tasks: Sequence[str] | None = None,
    device: str = "auto",
    dtype: torch.dtype | str = "auto",
) -> Specialists:
    """``model`` with the patterns of a store (those of ``tasks``, by default all), each to keep the
    share ``keep`` of the experts; at first the full model is active."""
    opened = Store(store)
    patterns = opened.load_all(tasks)
    plans = {pattern.task: compile_plan([pattern], keep) for pattern in patterns}
    opened.check_weights(fingerprint_of(model), model)
    network = load_stock(model, device=device, dtype=dtype)
    attach(network, plans[patterns[0].task], ranked=True)
    return Specialists(network, patterns, plans)
