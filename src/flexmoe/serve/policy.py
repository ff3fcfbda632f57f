"""The policy that turns the dial: down the family when answers are late, up when there is room.

One number judges a request: the share of its allowance that it used, `used`; above 1 it was too
slow. The 95th percentile of that over the requests since the last move is what `decide` goes by.
Only requests that follow the default count: moving it can help no others, and what the others
take from the machine shows in these.

Against flapping: moving down needs lateness, moving up needs half of the allowance unused for much
longer, and each climb that did not last doubles the wait for the next.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

from flexmoe.serve.dial import Dial
from flexmoe.serve.engine import Slo
from flexmoe.serve.ledger import Ledger, Ticket
from flexmoe.serve.resident import Resident

log = logging.getLogger("flexmoe.serve")

INTERVAL = 1.0  # seconds between decisions
WINDOW = 30.0  # seconds that are looked back, less after a move
DOWN_AFTER = 5.0  # seconds a budget is given before it is left for a poorer one
UP_AFTER = 20.0  # and for a richer one
LONGEST = 320.0  # seconds to wait for a climb after many that did not last
LASTED = 60.0  # seconds after which a climb has lasted
ROOM = 0.5  # of the allowance, at most, for a climb
SAMPLES = 5  # requests that make a percentile


@dataclass(frozen=True)
class Past:
    """What the next decision needs to know of moves before: when the last was and whether it went
    up, and how long to wait for a climb."""

    moved: float
    climbed: bool = False
    patience: float = UP_AFTER

    def after(self, up: bool, now: float) -> Past:
        """The same once the policy moved at ``now``."""
        lasted = now - self.moved >= LASTED
        if up:  # from a climb to a climb: there was room, no need for caution
            patience = UP_AFTER if self.climbed else self.patience
        elif self.climbed and not lasted:
            patience = min(2 * self.patience, LONGEST)
        else:
            patience = UP_AFTER if lasted else self.patience
        return Past(now, up, patience)


@dataclass(frozen=True)
class Move:
    """Where to turn the dial, and why."""

    budget: str
    up: bool
    reason: str


def used(ticket: Ticket, slo: Slo, now: float) -> float | None:
    """The share of its allowance that a request used, None if that cannot be said (yet).

    A stream is allowed ``ttft_ms`` for its first token and ``tpot_ms`` for each further one: the
    worse of both counts. An answer in one piece is allowed their sum. A stream that waits for its
    first token counts once it is late: without that, a server that stands still would look idle.
    """
    ttft, tpot = slo.ttft_ms / 1000, slo.tpot_ms / 1000
    if ticket.ended is None:
        late = (now - ticket.began) / ttft if ticket.streamed and ticket.first is None else 0.0
        return late if late > 1 else None
    if ticket.status != "ok" or not ticket.tokens:
        return None
    if not ticket.streamed:
        return (ticket.ended - ticket.began) / (ttft + tpot * (ticket.tokens - 1))
    return max((ticket.ttft or 0.0) / ttft, (ticket.tpot or 0.0) / tpot)


def percentile_95(values: Sequence[float]) -> float:
    """The smallest value that 95 % of ``values`` do not exceed; 0 of none."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else 0.0


def decide(
    ladder: Sequence[str],
    budget: str,
    shares: Sequence[float],
    running: int,
    now: float,
    past: Past,
) -> Move | None:
    """The next move, or None to stay.

    ``ladder``: labels the policy may choose, rich to poor; ``budget``: the default now, which may
    lie outside after a switch by hand; ``shares``: what requests at it used of their allowance
    since the last move; ``running``: how many run.
    """
    p95, since = percentile_95(shares), now - past.moved
    seen = f"p95 of {len(shares)} requests at {budget} is {p95:.2f} of the allowance"
    poorer = [b for b in ladder if float(b) > float(budget)]
    if p95 > 1 and len(shares) >= SAMPLES and since >= DOWN_AFTER and poorer:
        return Move(poorer[0], False, seen)
    richer = [b for b in ladder if float(b) < float(budget)]
    if not richer:
        return None
    if not shares and not running and since >= UP_AFTER:
        return Move(richer[-1], True, f"no requests for {since:.0f} s")
    if shares and p95 < ROOM and since >= past.patience:
        return Move(richer[-1], True, seen)
    return None


class Policy:
    """Drives the dial by `decide`. A switch by hand is kept until there is a reason to move from
    there: it starts the waits anew, and counts as a move."""

    def __init__(self, slo: Slo, dial: Dial, ledger: Ledger, resident: Resident):
        self.slo, self.dial, self.ledger, self.resident = slo, dial, ledger, resident
        rich, poor = float(slo.richest), float(slo.poorest)
        self.ladder = [b for b in dial.budgets.labels if rich <= float(b) <= poor]
        self.past = Past(ledger.clock())
        self.moves = 0
        self.last_reason = ""
        self._budget = dial.budget

    async def step(self) -> Move | None:
        """Look, and move if there is a reason."""
        if self.resident.one_at_a_time.locked():  # an operator is at the dial
            return None
        now, budget = self.ledger.clock(), self.dial.budget
        if budget != self._budget:  # by hand
            self.past, self._budget = Past(now), budget
        since = max(self.past.moved, now - WINDOW)
        seen = [*self.ledger.ended_since(since), *self.ledger.tickets]
        following = [t for t in seen if t.follows and t.budget == budget]
        shares = [s for t in following if (s := used(t, self.slo, now)) is not None]
        running = sum(t.follows for t in self.ledger.tickets)
        # what an operator released stays released
        ladder = [b for b in self.ladder if self.resident.has(b)]
        move = decide(ladder, budget, shares, running, now, self.past)
        if move is not None:
            await self.dial.turn(move.budget, "policy", move.reason)
            self.past = self.past.after(move.up, now)
            self._budget, self.last_reason = move.budget, move.reason
            self.moves += 1
            log.info("policy: default budget %s -> %s: %s", budget, move.budget, move.reason)
        return move

    def describe(self) -> dict:
        """For the routes: what it holds, where it may go, what it did."""
        return {
            "ttft_ms": self.slo.ttft_ms,
            "tpot_ms": self.slo.tpot_ms,
            "ladder": self.ladder,
            "moves": self.moves,
            "last_reason": self.last_reason,
        }
