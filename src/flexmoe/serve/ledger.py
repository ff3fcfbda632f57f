"""The requests of a server: which run, at which budget, and how fast they were answered."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from flexmoe.serve.metrics import Metrics

RATE_SECONDS = 5  # tokens per second are those of the last five
KEPT = 4096  # finished requests that are remembered


@dataclass(eq=False)
class Ticket:
    """One request from its arrival to its end. Times are of the ledger's clock, in seconds.

    ``follows``: its model id named no budget, so it got the default; ``first`` and ``last``: when
    text went out; ``prompt`` and ``tokens``: how many the prompt has, where the engine says, and
    the answer so far; ``ended`` and ``status`` see `Ledger.close`.
    """

    budget: str
    follows: bool
    streamed: bool
    began: float
    first: float | None = None
    last: float | None = None
    prompt: int = 0
    tokens: int = 0
    ended: float | None = None
    status: str = ""
    done: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ttft(self) -> float | None:
        """Seconds to the first token; None where the answer did not come in a stream."""
        return self.first - self.began if self.streamed and self.first is not None else None

    @property
    def tpot(self) -> float | None:
        """Mean seconds between tokens of a stream; None for fewer than two tokens."""
        if not self.streamed or self.first is None or self.last is None or self.tokens < 2:
            return None
        return (self.last - self.first) / (self.tokens - 1)


class Ledger:
    """All requests. Only the server's event loop may touch it."""

    def __init__(
        self, labels: tuple[str, ...], metrics: Metrics, clock: Callable[[], float] = time.monotonic
    ):
        self.labels, self.metrics, self.clock = labels, metrics, clock
        self.tickets: set[Ticket] = set()
        self.recent: deque[Ticket] = deque(maxlen=KEPT)
        self.ended: dict[str, Counter[str]] = {budget: Counter() for budget in labels}
        self.tokens: Counter[str] = Counter()
        self._per_second: deque[tuple[int, Counter[str]]] = deque(maxlen=RATE_SECONDS + 1)

    def open(self, budget: str, *, follows: bool, streamed: bool) -> Ticket:
        """A request has arrived and runs at ``budget``."""
        ticket = Ticket(budget, follows, streamed, self.clock())
        self.tickets.add(ticket)
        self.metrics.running.labels(budget).inc()
        return ticket

    def text(self, ticket: Ticket, tokens: int) -> None:
        """``tokens`` more tokens of its answer went out."""
        ticket.last = self.clock()
        if ticket.first is None:
            ticket.first = ticket.last
        self._count(ticket, tokens)

    def usage(self, ticket: Ticket, prompt: int | None, completion: int | None) -> None:
        """What the engine itself counted so far, which it may say again and again; better than
        counting pieces of text."""
        if completion is not None:
            self._count(ticket, max(0, completion - ticket.tokens))
        if prompt is not None and prompt > ticket.prompt:
            self.metrics.tokens.labels(ticket.budget, "prompt").inc(prompt - ticket.prompt)
            ticket.prompt = prompt

    def _count(self, ticket: Ticket, tokens: int) -> None:
        ticket.tokens += tokens
        self.tokens[ticket.budget] += tokens
        self.metrics.tokens.labels(ticket.budget, "completion").inc(tokens)
        second = int(self.clock())
        if not self._per_second or self._per_second[-1][0] != second:
            self._per_second.append((second, Counter()))
        self._per_second[-1][1][ticket.budget] += tokens

    def close(self, ticket: Ticket, status: str) -> None:
        """The request has ended: ok, refused (the engine said 4xx), failed or cancelled."""
        ticket.ended, ticket.status = self.clock(), status
        self.tickets.discard(ticket)
        self.recent.append(ticket)
        self.ended[ticket.budget][status] += 1
        self.metrics.running.labels(ticket.budget).dec()
        self.metrics.requests.labels(ticket.budget, status).inc()
        if status == "ok" and ticket.ttft is not None:
            self.metrics.ttft.labels(ticket.budget).observe(ticket.ttft)
        if status == "ok" and ticket.tpot is not None:
            self.metrics.tpot.labels(ticket.budget).observe(ticket.tpot)
        ticket.done.set()

    async def wait_for(self, which: Callable[[Ticket], bool], timeout: float) -> int:
        """Wait until the requests that run now and are ``which`` have ended; returns how many have
        not after ``timeout`` seconds."""
        ends = [asyncio.ensure_future(t.done.wait()) for t in self.tickets if which(t)]
        if not ends:
            return 0
        _, late = await asyncio.wait(ends, timeout=timeout)
        for end in late:
            end.cancel()
        return len(late)

    def running(self) -> dict[str, int]:
        """Requests in flight by budget."""
        found = Counter(ticket.budget for ticket in self.tickets)
        return {budget: found[budget] for budget in self.labels}

    def waiting(self) -> dict[str, int]:
        """Of those, the streams without a first token yet: queued, or at their prompt."""
        found = Counter(t.budget for t in self.tickets if t.streamed and t.first is None)
        return {budget: found[budget] for budget in self.labels}

    def rate(self) -> dict[str, float]:
        """Tokens per second by budget, over the last whole seconds."""
        now = int(self.clock())
        sums: Counter[str] = Counter()
        for second, counts in self._per_second:
            if now - RATE_SECONDS <= second < now:
                sums.update(counts)
        return {budget: sums[budget] / RATE_SECONDS for budget in self.labels}

    def ended_since(self, then: float) -> Iterator[Ticket]:
        """Requests that ended after ``then``, the latest first."""
        for ticket in reversed(self.recent):
            if (ticket.ended or 0.0) <= then:
                return
            yield ticket
