"""What Prometheus reads, beside the engine's own metrics."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram

from flexmoe.serve.ids import Budgets

# seconds: a token a millisecond to one in ten seconds; a first token within 10 ms to two minutes
TPOT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 1, 2.5, 10)
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 30, 120)
SWITCH_BUCKETS = (0.00001, 0.0001, 0.001, 0.01, 0.1, 1, 10)
NO_BUDGET = "none"  # of requests that were refused before they had one
NO_TASK = "none"  # of prompts that are near to no task


class Metrics:
    """Counters and histograms of one server, in ``registry`` (the default one is what engines
    show). A registry takes one such set."""

    def __init__(self, budgets: Budgets, registry: CollectorRegistry = REGISTRY):
        self.registry = registry
        self.requests = Counter(
            "flexmoe_requests",
            "Requests by budget and how they ended: ok, refused (4xx), failed, cancelled",
            ["budget", "status"],
            registry=registry,
        )
        self.tokens = Counter(
            "flexmoe_tokens",
            "Tokens by budget: prompt (where the answer says), completion",
            ["budget", "kind"],
            registry=registry,
        )
        self.running = Gauge(
            "flexmoe_requests_running",
            "Requests that are being answered",
            ["budget"],
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.switches = Counter(
            "flexmoe_switches",
            "Switches of the default budget, by whom: request, policy",
            ["from", "to", "by"],
            registry=registry,
        )
        self.default = Gauge(
            "flexmoe_budget_default",
            "Percent pruned of the default budget",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self.switch_seconds = Histogram(
            "flexmoe_switch_seconds",
            "From the wish to switch until new requests get the new budget",
            registry=registry,
            buckets=SWITCH_BUCKETS,
        )
        self.released = Gauge(
            "flexmoe_released_bytes",
            "Bytes of weights given back: those beyond the richest budget in memory",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self.ttft = Histogram(
            "flexmoe_ttft_seconds",
            "From a streamed request's arrival to its first token",
            ["budget"],
            registry=registry,
            buckets=TTFT_BUCKETS,
        )
        self.tpot = Histogram(
            "flexmoe_tpot_seconds",
            "Mean time between the tokens of a streamed request",
            ["budget"],
            registry=registry,
            buckets=TPOT_BUCKETS,
        )
        self.retrieved = Counter(
            "flexmoe_retrieved",
            "Prompts whose task was looked for, by the task that was found",
            ["task"],
            registry=registry,
        )
        self._show_zeros(budgets.rows)
        for task in (*budgets.tasks, NO_TASK) if budgets.tasks else ():
            self.retrieved.labels(task)

    def _show_zeros(self, labels: Iterable[str]) -> None:
        for budget in labels:  # a series that is absent cannot be told from one that is broken
            self.requests.labels(budget, "ok")
            self.running.labels(budget)
            for kind in ("prompt", "completion"):
                self.tokens.labels(budget, kind)
