"""The policy against simulated load: it goes down, comes back, does not flap."""

import asyncio

import pytest
from prometheus_client import CollectorRegistry

from flexmoe.serve import policy as rules
from flexmoe.serve.engine import Slo
from flexmoe.serve.ledger import Ticket
from flexmoe.serve.policy import Past, Policy, decide, percentile_95, used
from flexmoe.serve.state import ServeState
from serving import EchoEngine, Serving, settings

SLO = Slo(ttft_ms=500, tpot_ms=50, richest="0", poorest="40")
LADDER = ("0", "20", "40")


def ticket(**fields) -> Ticket:
    return Ticket(**{"budget": "0", "follows": True, "streamed": True, "began": 0.0} | fields)


@pytest.mark.parametrize(
    ("fields", "share"),
    [
        ({"first": 0.25, "last": 0.25 + 9 * 0.05, "tokens": 10, "ended": 1, "status": "ok"}, 1.0),
        ({"first": 1.0, "last": 1.1, "tokens": 10, "ended": 2, "status": "ok"}, 2.0),  # TTFT
        ({"first": 0.25, "last": 0.25, "tokens": 1, "ended": 1, "status": "ok"}, 0.5),
        ({"streamed": False, "tokens": 11, "ended": 2.0, "status": "ok"}, 2.0),  # 0.5 + 10 * 0.05
        ({"first": 0.1, "tokens": 3, "ended": 9, "status": "failed"}, None),
        ({"streamed": False, "tokens": 0, "ended": 2.0, "status": "ok"}, None),
        ({}, 20.0),  # waits at 10 s
        ({"began": 9.8}, None),  # not late yet
        ({"streamed": False}, None),  # cannot be said
        ({"first": 0.1, "tokens": 3}, None),  # under way
    ],
)
def test_the_share_of_the_allowance(fields, share):
    found = used(ticket(**fields), SLO, now=10.0)
    assert found == (share if share is None else pytest.approx(share))


def test_percentile():
    assert percentile_95([]) == 0
    assert percentile_95([3.0]) == 3
    assert percentile_95(list(range(1, 101))) == 95
    assert percentile_95([1.0] * 19 + [9.0]) == 1
    assert percentile_95([1.0] * 18 + [9.0]) == 9


def test_one_slow_request_moves_nothing():
    past = Past(0.0)
    assert decide(LADDER, "0", [9.0] * (rules.SAMPLES - 1), 0, 100, past) is None
    assert decide(LADDER, "0", [9.0] * rules.SAMPLES, 0, 100, past).budget == "20"
    assert decide(LADDER, "0", [9.0] * 9, 0, rules.DOWN_AFTER - 1, past) is None  # moved just now


def test_between_the_thresholds_it_stays():
    for share in (rules.ROOM + 0.01, 0.8, 1.0):
        assert decide(LADDER, "20", [share] * 50, 5, 1000, Past(0.0)) is None


def test_it_keeps_to_the_ladder():
    late, quick = [3.0] * 20, [0.1] * 20
    assert decide(LADDER, "40", late, 5, 100, Past(0.0)) is None  # poorer is not allowed
    assert decide(LADDER, "0", quick, 5, 100, Past(0.0)) is None
    assert decide(LADDER, "60", quick, 5, 100, Past(0.0)).budget == "40"  # set by hand
    assert decide(("20", "40"), "0", late, 5, 100, Past(0.0)).budget == "20"


def test_idle_it_comes_back_whatever_its_patience():
    past = Past(0.0, patience=rules.LONGEST)
    assert decide(LADDER, "40", [], 0, rules.UP_AFTER, past).budget == "20"
    assert decide(LADDER, "40", [], 3, rules.UP_AFTER, past) is None  # not idle: they run long
    assert decide(LADDER, "40", [], 3, rules.LONGEST, past) is None


def test_climbs_that_do_not_last_make_it_patient():
    past = Past(0.0)
    for n in (1, 2, 3):
        past = past.after(True, 1000.0 * n)
        past = past.after(False, 1000.0 * n + 10)
        assert past.patience == rules.UP_AFTER * 2**n
    past = past.after(True, 9000).after(True, 9500)
    assert past.patience == rules.UP_AFTER  # from a climb to a climb: there is room
    longer = 1000 + rules.LASTED
    climbed, fell = Past(1000, True, 80.0), Past(1000, False, 80.0)
    assert climbed.after(False, longer).patience == rules.UP_AFTER  # it did last
    assert climbed.after(False, longer - 1).patience == 160
    assert fell.after(False, longer).patience == rules.UP_AFTER
    assert fell.after(False, longer - 1).patience == 80  # further down, as wary as before
    assert Past(1000, True, rules.LONGEST).after(False, 1010).patience == rules.LONGEST


class Simulated:
    """A server of one clock: every second ``rate`` requests come and are answered by its end,
    each using ``share(budget)`` of its allowance."""

    def __init__(self, slo=SLO):
        self.now = 0.0
        state = ServeState(settings(slo=slo), EchoEngine(), CollectorRegistry())
        state.ledger.clock = lambda: self.now
        self.state, self.ledger = state, state.ledger
        self.policy = Policy(slo, state.dial, state.ledger, state.resident)
        self.path = [state.dial.budget]

    async def run(self, seconds, share, rate=5, model_budget=None):
        for _ in range(seconds):
            budget = model_budget or self.state.dial.budget
            for _ in range(rate):
                t = self.ledger.open(budget, follows=model_budget is None, streamed=True)
                t.began = self.now - share(budget) * 0.5
                self.ledger.text(t, 1)
                self.ledger.close(t, "ok")
            self.now += 1
            if await self.policy.step():
                self.path.append(self.state.dial.budget)


def test_overload_goes_to_the_poorest_and_back_when_it_ends():
    async def go():
        s = Simulated()
        await s.run(60, lambda budget: 4.0)
        assert s.path == ["0", "20", "40"]  # and no further: 60 is outside
        await s.run(120, lambda budget: 0.1)
        assert s.path == ["0", "20", "40", "20", "0"]
        assert s.state.dial.switches == 4

    asyncio.run(go())


def test_it_stays_where_the_load_is_met():
    async def go():
        s = Simulated()
        await s.run(600, lambda budget: {"0": 2.0, "20": 0.8, "40": 0.4}[budget])
        assert s.path == ["0", "20"]

    asyncio.run(go())


def test_no_flapping_between_two_budgets_where_neither_fits():
    """One is too slow, the next has much room: every climb fails, so climbs become rare."""

    async def go():
        s = Simulated()
        await s.run(1200, lambda budget: {"0": 1.3, "20": 0.3, "40": 0.1}[budget])
        assert set(s.path) == {"0", "20"}
        assert len(s.path) <= 14  # waits of 20, 40, 80, 160, 320, 320; unchanged 96 moves

    asyncio.run(go())


def test_a_server_that_stands_still_counts_as_late():
    async def go():
        s = Simulated()
        for _ in range(6):
            s.ledger.open("0", follows=True, streamed=True)
        for _ in range(10):
            s.now += 1
            await s.policy.step()
        assert s.state.dial.budget == "20"

    asyncio.run(go())


def test_requests_that_name_a_budget_are_left_alone_and_do_not_count():
    async def go():
        s = Simulated()
        await s.run(100, lambda budget: 9.0, model_budget="0")
        assert s.path == ["0"]

    asyncio.run(go())


def test_a_switch_by_hand_is_kept_until_there_is_a_reason():
    async def go():
        s = Simulated()
        await s.run(30, lambda budget: 0.8)
        await s.state.dial.turn("60", "request")  # even outside of richest and poorest
        await s.run(10, lambda budget: 0.1)
        assert s.state.dial.budget == "60"  # room, but not long enough
        await s.run(300, lambda budget: 0.8)
        assert s.state.dial.budget == "60"
        await s.run(100, lambda budget: 0.1)
        assert s.path == ["0", "40", "20", "0"]

    asyncio.run(go())


def test_moves_are_logged_with_the_reason_and_counted(caplog):
    async def go():
        s = Simulated()
        with caplog.at_level("INFO", "flexmoe.serve"):
            await s.run(8, lambda budget: 4.0)
        assert caplog.messages == [
            "policy: default budget 0 -> 20: p95 of 20 requests at 0 is 4.00 of the allowance"
        ]
        value = s.ledger.metrics.registry.get_sample_value
        labels = {"from": "0", "to": "20", "by": "policy"}
        assert value("flexmoe_switches_total", labels) == 1
        found = s.policy.describe()
        assert found["moves"] == 1 and found["ladder"] == ["0", "20", "40"]

    asyncio.run(go())


def test_the_server_drives_it(monkeypatch, caplog):
    """Through the middleware, over the real clock, at a faster pace; past a switch that fails."""
    monkeypatch.setattr("flexmoe.serve.state.INTERVAL", 0.02)
    monkeypatch.setattr(rules, "DOWN_AFTER", 0.05)
    monkeypatch.setattr(rules, "SAMPLES", 1)

    async def go():
        serving = Serving(slo=replace_slo(ttft_ms=0.001))
        serving.engine.broken = True
        for _ in range(200):
            answer = await serving.complete(stream=True)
            serving.engine.broken &= "budget could not be moved" not in caplog.text
            if answer.headers["x-flexmoe-budget"] == "40":
                break
            await asyncio.sleep(0.01)
        assert serving.state.dial.budget == "40" and not serving.engine.broken
        assert (await serving.client.get("/flexmoe/budget")).json()["policy"]["moves"] == 2
        serving.state.stop()

    asyncio.run(asyncio.wait_for(go(), 20))


def replace_slo(**changes) -> Slo:
    return SLO.model_copy(update=changes)


def test_what_an_operator_released_stays_released():
    async def go():
        s = Simulated()
        async with s.state.resident.one_at_a_time:
            await s.state.dial.turn("40", "request")
            await s.state.resident.keep("20", 1.0)
        await s.run(200, lambda budget: 0.1)
        assert s.path == ["0", "20"]  # up from 40, not to 0

    asyncio.run(go())
