"""All that one server knows while it runs."""

from __future__ import annotations

import asyncio
import logging

from prometheus_client import REGISTRY, CollectorRegistry

from flexmoe.serve.dial import Dial
from flexmoe.serve.engine import Engine, ServeSettings
from flexmoe.serve.ledger import Ledger
from flexmoe.serve.metrics import Metrics
from flexmoe.serve.policy import INTERVAL, Policy
from flexmoe.serve.resident import Resident

log = logging.getLogger("flexmoe.serve")


class ServeState:
    """Settings, engine, requests, dial and policy of one server.

    ``registry`` is where its metrics go; the default one takes those of one server.
    """

    def __init__(
        self, settings: ServeSettings, engine: Engine, registry: CollectorRegistry = REGISTRY
    ):
        self.settings, self.engine, self.budgets = settings, engine, settings.budgets
        self.ledger = Ledger(self.budgets.rows, Metrics(self.budgets, registry))
        self.dial = Dial(self.budgets, settings.default, engine, self.ledger)
        self.resident = Resident(self.budgets, engine, self.ledger)
        self.policy = None
        if settings.slo:
            self.policy = Policy(settings.slo, self.dial, self.ledger, self.resident)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Let the policy run, from within the event loop; again does nothing."""
        if self.policy is not None and self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._drive(self.policy))

    def stop(self) -> None:
        """End the policy."""
        if self._task is not None:
            self._task.cancel()

    async def _drive(self, policy: Policy) -> None:
        while True:
            await asyncio.sleep(INTERVAL)
            try:
                await policy.step()
            except Exception:  # the engine refused a switch: the next look may go better
                log.exception("policy: the default budget could not be moved")

    def status(self) -> dict:
        """Everything the page shows, as JSON: the budgets with figures and live numbers."""
        running, waiting, rate = self.ledger.running(), self.ledger.waiting(), self.ledger.rate()
        full = self.settings.members[0]
        budgets = [
            {
                "budget": member.budget,
                "id": self.budgets.id(member.budget),
                **member.model_dump(),
                "bytes_saved": full.bytes - member.bytes,
                "running": running[member.budget],
                "waiting": waiting[member.budget],
                "tokens_per_second": rate[member.budget],
                "tokens": self.ledger.tokens[member.budget],
                "requests": dict(self.ledger.ended[member.budget]),
            }
            for member in self.settings.members
        ]
        tasks = [
            {
                "id": self.budgets.id(task.task),
                **task.model_dump(),
                "running": running[task.task],
                "tokens_per_second": rate[task.task],
                "requests": dict(self.ledger.ended[task.task]),
            }
            for task in self.settings.tasks
        ]
        history = [vars(switch) for switch in self.dial.history]
        return {
            "name": self.settings.name,
            **self.dial_status(),
            "budgets": budgets,
            "tasks": tasks,
            "history": history,
        }

    def dial_status(self) -> dict:
        """The answer of ``GET /flexmoe/budget``."""
        return {
            "budget": self.dial.budget,
            "budgets": list(self.budgets.labels),
            "running": self.ledger.running(),
            "switches": self.dial.switches,
            "in_memory": [b for b in self.budgets.labels if self.resident.has(b)],
            "released_bytes": self.resident.released,
            "policy": self.policy.describe() if self.policy else None,
        }
