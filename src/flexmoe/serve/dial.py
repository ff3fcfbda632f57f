"""The dial: the budget of requests that name none."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from dataclasses import dataclass

from flexmoe.serve.engine import Engine
from flexmoe.serve.ids import Budgets
from flexmoe.serve.ledger import Ledger


@dataclass(frozen=True)
class Switch:
    """One move of the dial: who asked (``request`` or ``policy``), the reason, and the seconds from
    the wish until new requests got the new budget."""

    before: str
    budget: str
    by: str
    reason: str
    seconds: float


class Dial:
    """The default budget. A request reads it once, when it arrives: a move never touches what
    runs already."""

    def __init__(self, budgets: Budgets, default: str, engine: Engine, ledger: Ledger):
        budgets.share(default)
        self.budgets, self.budget = budgets, default
        self.engine, self.ledger = engine, ledger
        self.switches = 0
        self.history: deque[Switch] = deque(maxlen=50)
        self._one_at_a_time = asyncio.Lock()
        ledger.metrics.default.set(float(default))

    async def turn(self, budget: str, by: str, reason: str = "") -> float:
        """Make ``budget`` the default; returns the seconds it took. A `FlexmoeError` for one that
        is not served; what the engine raises leaves the dial where it was."""
        self.budgets.share(budget)
        start = time.perf_counter()
        async with self._one_at_a_time:
            before = self.budget
            if budget != before:
                await self.engine.on_switch(budget)
                self.budget = budget
        seconds = time.perf_counter() - start
        if budget != before:
            self.switches += 1
            self.history.append(Switch(before, budget, by, reason, seconds))
            metrics = self.ledger.metrics
            metrics.switches.labels(before, budget, by).inc()
            metrics.switch_seconds.observe(seconds)
            metrics.default.set(float(budget))
        return seconds

    async def settle(self, timeout: float) -> int:
        """Wait until no request runs that got an earlier default; returns how many still do after
        ``timeout`` seconds. Requests that named their budget are not waited for."""
        return await self.ledger.wait_for(lambda t: t.follows and t.budget != self.budget, timeout)
