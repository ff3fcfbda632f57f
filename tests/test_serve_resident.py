"""Memory given back over HTTP: who waits, who is refused, and how it is read again."""

import asyncio

from serving import Serving, run, until


def test_what_is_released_is_refused_until_a_richer_budget_is_asked_for():
    async def go():
        serving = Serving()
        freed = (await serving.turn("40", release=True)).json()
        assert freed["budget"] == "40" and freed["freed_bytes"] == freed["released_bytes"] == 400
        assert freed["in_memory"] == ["40", "60"] and serving.engine.kept == 40
        assert serving.metric("flexmoe_released_bytes") == 400
        refused = await serving.complete("moe:20")
        error = refused.json()["error"]
        assert refused.status_code == 503 and "what is beyond 40 was released" in error["message"]
        assert error["param"] == "model" and not serving.echo.bodies
        for model, budget in (("moe", "40"), ("moe:40", "40"), ("moe:60", "60")):
            assert (await serving.complete(model)).headers["x-flexmoe-budget"] == budget
        # poorer: nothing is read; then a further tier; then part of it comes back, then all
        assert (await serving.turn("60")).json()["freed_bytes"] == 0
        assert (await serving.turn("60", release=True)).json()["released_bytes"] == 600
        back = (await serving.turn("20", release=True)).json()
        assert back["freed_bytes"] == -400 and back["in_memory"] == ["20", "40", "60"]
        whole = (await serving.turn("0")).json()
        assert whole["freed_bytes"] == -200 and whole["released_bytes"] == 0
        assert serving.metric("flexmoe_released_bytes") == 0
        assert (await serving.complete("moe:0")).status_code == 200

    run(go())


def test_requests_at_richer_budgets_are_waited_for():
    async def go():
        serving = Serving()
        running = asyncio.create_task(serving.complete("moe:20", "wait"))
        await until(lambda: serving.echo.bodies)
        wish = asyncio.create_task(serving.turn("40", release=True))
        await until(lambda: not serving.state.resident.has("20"))
        assert (await serving.complete("moe:20")).status_code == 503  # or it would never end
        assert serving.engine.kept == 0 and not wish.done()
        serving.echo.gate.set()
        assert (await running).headers["x-flexmoe-budget"] == "20"
        assert (await wish).json()["freed_bytes"] == 400 and serving.engine.kept == 40

    run(go())


def test_nothing_is_released_under_requests_that_do_not_end():
    async def go():
        serving = Serving(strict_timeout=0.05)
        running = asyncio.create_task(serving.complete("moe:20", "wait"))
        await until(lambda: serving.echo.bodies)
        late = await serving.turn("40", release=True)
        message = late.json()["error"]["message"]
        assert late.status_code == 503 and "the default is 40 now, but after 0.05 s" in message
        assert "1 requests at budgets richer than 40: nothing was released" in message
        assert serving.engine.kept == 0 and serving.state.resident.has("20")
        serving.echo.gate.set()
        assert (await running).status_code == 200

    run(go())


def test_what_cannot_be_read_again_leaves_the_dial():
    async def go():
        serving = Serving()
        await serving.turn("40", release=True)
        serving.engine.broken = True
        answer = await serving.turn("20")
        assert answer.status_code == 503 and "checkpoint is gone" in answer.text
        assert serving.state.dial.budget == "40" and not serving.state.resident.has("20")
        serving.engine.broken = False
        assert (await serving.turn("20")).json()["budget"] == "20"

    run(go())


def test_an_engine_that_cannot_says_so_and_the_dial_stays():
    async def go():
        serving = Serving()
        serving.engine.no_release = "this engine cannot"
        answer = await serving.turn("40", release=True)
        assert answer.status_code == 501 and "this engine cannot" in answer.text
        assert serving.state.dial.budget == "0"

    run(go())
