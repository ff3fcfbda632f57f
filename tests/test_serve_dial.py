"""The dial over HTTP: reading, turning, waiting, what is refused."""

import asyncio

import pytest

from serving import Serving, run, until


def test_reading_and_turning():
    async def go():
        serving = Serving()
        before = (await serving.client.get("/flexmoe/budget")).json()
        assert before == {
            "budget": "0",
            "budgets": ["0", "20", "40", "60"],
            "running": {"0": 0, "20": 0, "40": 0, "60": 0},
            "switches": 0,
            "in_memory": ["0", "20", "40", "60"],
            "released_bytes": 0,
            "policy": None,
        }
        after = (await serving.turn("40")).json()
        assert after["budget"] == "40" and after["switches"] == 1 and 0 < after["seconds"] < 1
        assert (await serving.turn("40")).json()["switches"] == 1  # already there
        assert serving.engine.switched == ["40"]
        labels = {"from": "0", "to": "40", "by": "request"}
        assert serving.metric("flexmoe_switches_total", **labels) == 1
        assert serving.metric("flexmoe_switch_seconds_count") == 1
        assert serving.metric("flexmoe_budget_default") == 40

    run(go())


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        ({"budget": "39"}, 404, "unknown budget '39' (percent pruned). Did you mean '40'?"),
        ({"budget": "nope"}, 404, "Known: 0, 20, 40, 60"),
        ({"budget": 40}, 422, 'budget must be a string such as "40", found 40'),
        ({}, 422, "found None"),
        ({"budget": "40", "strict": 1}, 422, "strict must be true or false"),
        ({"budget": "40", "strickt": True}, 422, "unknown field 'strickt'"),
        ({"budget": "40", "release": "yes"}, 422, "release must be true or false, found 'yes'"),
        ({"budget": "39", "release": True}, 404, "unknown budget '39'"),
        ([], 400, "must be a JSON object"),
    ],
)
def test_wrong_wishes_leave_the_dial(body, code, message):
    async def go():
        serving = Serving(default="20")
        answer = await serving.client.post("/flexmoe/budget", json=body)
        assert answer.status_code == code and message in answer.json()["error"]["message"]
        assert serving.state.dial.budget == "20" and serving.state.dial.switches == 0

    run(go())


def test_only_json_turns_the_dial():
    async def go():
        serving = Serving()
        answer = await serving.client.post("/flexmoe/budget", content=b'{"budget": "40"}')
        assert answer.status_code == 415 and serving.state.dial.budget == "0"

    run(go())


def test_other_routes_and_methods():
    async def go():
        client = Serving().client
        assert (await client.get("/flexmoe/budgets")).status_code == 404
        assert (await client.delete("/flexmoe/budget")).status_code == 405

    run(go())


def test_strict_waits_for_requests_at_other_defaults_only():
    async def go():
        serving = Serving()
        follower = asyncio.create_task(serving.complete("moe", "wait"))
        named = asyncio.create_task(serving.complete("moe:60", "wait", stream=True))
        await until(lambda: len(serving.echo.bodies) == 2)
        switch = asyncio.create_task(serving.turn("40", strict=True))
        await until(lambda: serving.state.dial.budget == "40")
        late = asyncio.create_task(serving.complete("moe", "wait"))  # begins at 40 already
        await until(lambda: len(serving.echo.bodies) == 3)
        await asyncio.sleep(0.05)
        assert not switch.done()
        ticket = next(t for t in serving.state.ledger.tickets if t.follows and t.budget == "0")
        serving.state.ledger.close(ticket, "ok")  # as if this one alone had ended
        answer = await switch
        assert answer.status_code == 200 and not named.done() and not late.done()
        for task in (follower, named, late):
            task.cancel()

    run(go())


def test_strict_gives_up_and_says_what_is():
    async def go():
        serving = Serving(strict_timeout=0.05)
        waiting = asyncio.create_task(serving.complete("moe", "wait"))
        await until(lambda: len(serving.echo.bodies) == 1)
        answer = await serving.turn("40", strict=True)
        assert answer.status_code == 503
        assert "default is 40 now" in answer.json()["error"]["message"]
        assert serving.state.dial.budget == "40"
        serving.echo.gate.set()
        assert (await waiting).headers["x-flexmoe-budget"] == "0"

    run(go())


def test_an_engine_that_does_not_switch_keeps_the_default():
    async def go():
        serving = Serving(default="20")
        serving.engine.broken = True
        answer = await serving.turn("40")
        assert answer.status_code == 503
        assert "the default is 20: worker is gone" in answer.json()["error"]["message"]
        assert serving.state.dial.switches == 0
        assert (await serving.complete()).headers["x-flexmoe-budget"] == "20"

    run(go())


def test_the_status_has_all_the_page_shows():
    async def go():
        serving = Serving()
        await serving.complete("moe:20")
        await serving.turn("40")
        found = (await serving.client.get("/flexmoe/status")).json()
        assert found["name"] == "moe" and found["budget"] == "40"
        assert [b["id"] for b in found["budgets"]] == ["moe:0", "moe:20", "moe:40", "moe:60"]
        assert found["budgets"][1]["tokens"] == 3 and found["budgets"][1]["requests"] == {"ok": 1}
        assert found["budgets"][2]["bytes_saved"] == 400
        assert [(s["before"], s["budget"], s["by"]) for s in found["history"]] == [
            ("0", "40", "request")
        ]

    run(go())
