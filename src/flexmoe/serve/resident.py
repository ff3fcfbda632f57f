"""Which budgets are in memory: what is richer can be given back to the machine, and read again."""

from __future__ import annotations

import asyncio

from flexmoe.serve.engine import Engine
from flexmoe.serve.http import Refused
from flexmoe.serve.ids import Budgets
from flexmoe.serve.ledger import Ledger


class Resident:
    """The weights in memory: all that ``richest`` and poorer budgets need. ``released``: bytes of
    those that the server began with and gave back."""

    def __init__(self, budgets: Budgets, engine: Engine, ledger: Ledger):
        self.budgets, self.engine, self.ledger = budgets, engine, ledger
        self.richest = budgets.labels[0]
        self.released = 0
        # held for the whole of a wish: the default must not go where memory is being given back
        self.one_at_a_time = asyncio.Lock()

    def has(self, row: str) -> bool:
        """Whether requests can run at this budget or task."""
        labels = self.budgets.labels
        return self.richest == labels[0] or labels.index(row) >= labels.index(self.richest)

    def check(self, row: str) -> None:
        """`Refused` (503) for a budget that is not in memory now."""
        if not self.has(row):
            raise Refused(
                503,
                f"budget '{row}' is not in memory: what is beyond {self.richest} was released. "
                f'POST /flexmoe/budget {{"budget": "{row}"}} reads it again',
                "model",
            )

    async def keep(self, richest: str, timeout: float) -> int:
        """Have in memory what ``richest`` and poorer budgets need, and nothing else; returns the
        bytes given back, negative where some were read again.

        Requests at richer budgets are refused from now on, and waited for where they run. `Refused`
        (503) if they still do after ``timeout`` seconds: then nothing is given back. The caller
        holds ``one_at_a_time``.
        """
        before, labels = self.richest, self.budgets.labels
        if richest == before:
            return 0
        if labels.index(richest) > labels.index(before):
            self.richest = richest
        try:
            if late := await self.ledger.wait_for(lambda t: not self.has(t.budget), timeout):
                raise Refused(
                    503,
                    f"after {timeout:g} s there are still {late} requests at budgets richer than "
                    f"{richest}: nothing was released",
                )
            freed = await self.engine.keep(richest)
        except BaseException:
            self.richest = before
            raise
        self.richest = richest
        self.released += freed
        self.ledger.metrics.released.set(self.released)
        return freed
