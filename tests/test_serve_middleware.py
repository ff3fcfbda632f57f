"""The middleware in front of an engine that echoes: ids, pinning, answers, counts, bad input."""

import asyncio
import json

import pytest

from serving import INSIDE, Serving, run, until


@pytest.mark.parametrize(
    ("model", "budget"), [("moe", "20"), (None, "20"), ("moe:0", "0"), ("moe:60", "60")]
)
def test_the_id_picks_the_budget(model, budget):
    async def go():
        serving = Serving(default="20")
        answer = await serving.complete(model)
        assert answer.status_code == 200 and answer.headers["x-flexmoe-budget"] == budget
        assert answer.json()["model"] == (model or "moe")
        # inside text nothing is replaced
        assert answer.json()["choices"][0]["text"] == f'{budget}: hi "model": "{INSIDE}"'
        assert int(answer.headers["content-length"]) == len(answer.content)
        assert serving.echo.bodies == [{"prompt": "hi", "model": INSIDE, "budget": budget}]

    run(go())


def test_a_client_cannot_choose_a_budget_beside_its_id():
    async def go():
        answer = await (serving := Serving()).complete("moe:40", budget="0")
        assert answer.json()["choices"][0]["text"].startswith("40:")
        twice = b'{"model": "moe:60", "model": "moe:40", "prompt": "hi", "budget": "0"}'
        await serving.client.post("/v1/completions", content=twice)
        assert serving.echo.bodies[1] == {"model": INSIDE, "prompt": "hi", "budget": "40"}

    run(go())


@pytest.mark.parametrize("prompt", ["hi", "split"])
def test_streams_pass_with_the_id_asked_for(prompt):
    async def go():
        serving = Serving()
        answer = await serving.complete("moe:40", prompt, stream=True)
        assert answer.headers["x-flexmoe-budget"] == "40"
        assert answer.text.endswith("data: [DONE]\n\n")
        events = [json.loads(line[6:]) for line in answer.text.split("\n\n")[:-2]]
        assert [e["choices"][0]["text"] for e in events] == [" one", " two", " three"]
        assert {(e["model"], e["budget"]) for e in events} == {("moe:40", "40")}
        assert serving.metric("flexmoe_tokens_total", budget="40", kind="completion") == 3
        assert serving.metric("flexmoe_ttft_seconds_count", budget="40") == 1
        assert serving.metric("flexmoe_tpot_seconds_count", budget="40") == 1

    run(go())


def test_text_of_a_stream_is_not_held_back():
    async def go():
        serving, seen = Serving(), []
        body = json.dumps({"model": "moe", "prompt": "wait", "stream": True}).encode()
        answer, gone = client(serving.app, body, seen)
        await until(lambda: len(seen) == 2)
        assert seen[0]["type"] == "http.response.start" and b" one" in seen[1]["body"]
        serving.echo.gate.set()
        await answer
        assert b"[DONE]" in seen[-2]["body"] and not seen[-1]["more_body"]
        assert not gone.is_set()

    run(go())


def client(app, body, seen, path="/v1/completions"):
    """A client spoken to in ASGI: the task of its request, and an event to make it go away."""
    gone, asked = asyncio.Event(), False

    async def receive():
        nonlocal asked
        if not asked:
            asked = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        seen.append(message)

    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    return asyncio.create_task(app(scope, receive, send)), gone


def test_a_client_that_goes_away_is_not_counted_on():
    async def go():
        serving, seen = Serving(), []
        body = json.dumps({"prompt": "wait", "stream": True}).encode()
        answer, gone = client(serving.app, body, seen)
        await until(lambda: serving.state.ledger.running()["0"] == 1 and len(seen) == 2)
        assert serving.state.ledger.waiting()["0"] == 0
        gone.set()
        await answer
        assert serving.state.ledger.running()["0"] == 0
        assert serving.metric("flexmoe_requests_total", budget="0", status="cancelled") == 1
        assert serving.metric("flexmoe_requests_running", budget="0") == 0

    run(go())


def test_a_stream_that_ends_because_its_client_left_is_cancelled():
    """Engines may still send an end, as if nothing were."""

    async def go():
        serving, seen = Serving(), []

        async def engine(scope, receive, send):
            kind = [(b"content-type", b"text/event-stream")]
            await send({"type": "http.response.start", "status": 200, "headers": kind})
            while (await receive())["type"] != "http.disconnect":
                pass
            await send({"type": "http.response.body", "body": b""})

        serving.app.app = engine
        answer, gone = client(serving.app, b'{"stream": true}', seen)
        gone.set()
        await answer
        assert serving.metric("flexmoe_requests_total", budget="0", status="cancelled") == 1

    run(go())


def test_running_requests_keep_the_default_they_came_with():
    async def go():
        serving = Serving()
        waiting = [asyncio.create_task(serving.complete("moe", "wait")) for _ in range(3)]
        await until(lambda: len(serving.echo.bodies) == 3)
        assert (await serving.turn("40")).json()["running"] == {"0": 3, "20": 0, "40": 0, "60": 0}
        assert (await serving.complete()).headers["x-flexmoe-budget"] == "40"
        serving.echo.gate.set()
        answers = await asyncio.gather(*waiting)
        assert {a.headers["x-flexmoe-budget"] for a in answers} == {"0"}

    run(go())


def test_counts_and_metrics():
    async def go():
        serving = Serving()
        await serving.complete("moe:20")
        await serving.complete("moe:20", "refuse")
        await serving.complete("moe:20", "fail")
        await serving.complete("moe:20", "break", stream=True)
        await serving.complete("moe:33")
        total = {
            status: serving.metric("flexmoe_requests_total", budget="20", status=status)
            for status in ("ok", "refused", "failed")
        }
        assert total == {"ok": 1, "refused": 1, "failed": 2}
        assert serving.metric("flexmoe_requests_total", budget="none", status="refused") == 1
        # 3 by usage, 3 in the stream that broke
        assert serving.metric("flexmoe_tokens_total", budget="20", kind="completion") == 6
        assert serving.metric("flexmoe_tokens_total", budget="20", kind="prompt") == 5
        text = (await serving.client.get("/metrics")).text
        assert 'flexmoe_requests_total{budget="20",status="failed"} 2.0' in text
        assert "flexmoe_budget_default 0.0" in text

    run(go())


def test_tokens_that_are_reported_again_are_counted_once():
    async def go():
        serving = Serving()
        await serving.complete("moe:20", "count", stream=True)
        found = [
            serving.metric("flexmoe_tokens_total", budget="20", kind=kind)
            for kind in ("prompt", "completion")
        ]
        assert found == [7, 3]

    run(go())


def test_an_engines_refusal_passes():
    async def go():
        answer = await Serving().complete("moe:20", "refuse")
        assert answer.status_code == 400
        assert answer.json() == {"error": {"message": "too long"}, "model": "moe:20"}

    run(go())


def test_models_are_listed_like_adapters():
    async def go():
        serving = Serving(default="20")
        found = (await serving.client.get("/v1/models")).json()["data"]
        ids = ["moe", "moe:0", "moe:20", "moe:40", "moe:60", "other"]
        assert [entry["id"] for entry in found] == ids
        assert found[0]["max_len"] == 9 and found[0]["flexmoe"] == {"default": "20"}
        assert found[3] == {
            "id": "moe:40",
            "object": "model",
            "created": 7,
            "owned_by": "engine",
            "root": "moe",
            "parent": "moe",
            "flexmoe": {"pruned": 0.4, "routed_parameters": 600, "bytes": 1600},
        }
        assert (await serving.client.get("/v1/models/moe:40")).json() == found[3]
        missing = await serving.client.get("/v1/models/moe:41")
        assert missing.status_code == 404 and "moe:40" in missing.json()["error"]["message"]

    run(go())


BAD = [
    (b"{", 400, "not valid JSON"),
    (b"[1]", 400, "must be a JSON object, found list"),
    (b"\xff\xfe", 400, "not valid JSON"),
    (b"", 400, "not valid JSON"),
    (b"[" * 100_000, 400, "not valid JSON"),
    (b'{"prompt": "\\ud800"}', 400, "surrogates not allowed"),
    (b'{"model": 3}', 400, "model must be a string, found int"),
    (b'{"model": "moe:99"}', 404, "Did you mean"),
    (b'{"model": "gpt-4"}', 404, "Known: moe, moe:0, moe:20, moe:40, moe:60"),
    (b'{"prompt": "' + b"x" * 5000 + b'"}', 413, "longer than the 4,096 bytes"),
]


@pytest.mark.parametrize(("body", "code", "message"), BAD)
def test_bad_input_is_answered_and_the_server_goes_on(body, code, message):
    async def go():
        serving = Serving(max_body=4096 if code == 413 else 2**20)
        for path in ("/v1/completions", "/v1/chat/completions", "/v1/responses"):
            answer = await serving.client.post(path, content=body)
            error = answer.json()["error"]
            assert answer.status_code == code == error["code"]
            assert message in error["message"] and len(error["message"]) < 300
            assert error.keys() == {"message", "type", "param", "code"}
        assert serving.echo.bodies == []
        assert (await serving.complete()).status_code == 200
        assert sum(serving.state.ledger.running().values()) == 0

    run(go())


def test_unknown_models_have_openais_error():
    async def go():
        answer = await Serving().complete("moe:41")
        assert answer.json() == {
            "error": {
                "message": "unknown model 'moe:41'. Did you mean 'moe:40'? "
                "Known: moe, moe:0, moe:20, moe:40, moe:60",
                "type": "NotFoundError",
                "param": "model",
                "code": 404,
            }
        }

    run(go())


def test_a_body_without_length_is_bounded_too():
    async def go():
        serving = Serving(max_body=4096)

        async def endless():
            while True:
                yield b" " * 1000

        answer = await serving.client.post("/v1/completions", content=endless())
        assert answer.status_code == 413

    run(go())


GUARDED = [
    ("POST", "/v1/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/moe"),
    ("POST", "/flexmoe/budget"),
    ("POST", "/reset"),  # the engine's own
]
OPEN = ["/health", "/metrics", "/flexmoe/budget", "/flexmoe/status", "/flexmoe/ui"]


@pytest.mark.parametrize("key", [None, "Bearer wrong", "Bearer ", "Basic secret", "secret"])
def test_what_changes_something_needs_the_key(key):
    async def go():
        serving = Serving(api_key="secret")
        headers = {} if key is None else {"Authorization": key}
        for method, path in GUARDED:
            answer = await serving.client.request(method, path, headers=headers, json={})
            assert answer.status_code == 401, path
            assert "Authorization: Bearer" in answer.json()["error"]["message"]
        assert serving.echo.bodies == [] and serving.state.dial.budget == "0"
        for path in OPEN:
            assert (await serving.client.get(path, headers=headers)).status_code == 200, path

    run(go())


def test_with_the_key_everything_works():
    async def go():
        serving = Serving(api_key="secret")
        serving.client.headers["Authorization"] = "Bearer secret"
        assert (await serving.complete()).status_code == 200
        assert (await serving.turn("40")).status_code == 200
        assert (await serving.client.get("/v1/models")).status_code == 200
        assert (await serving.client.post("/reset")).text == "reset"

    run(go())


def test_two_hundred_requests_while_the_dial_turns():
    async def go():
        serving = Serving()

        async def one(n):
            model = "moe" if n % 2 else f"moe:{(0, 20, 40, 60)[n // 2 % 4]}"
            answer = await serving.complete(model, stream=n % 3 == 0)
            assert answer.status_code == 200
            budget = answer.headers["x-flexmoe-budget"]
            assert f'"budget":"{budget}"' in answer.text or f'"{budget}: hi' in answer.text
            assert model == "moe" or model == f"moe:{budget}"
            return budget

        async def turn():
            for n in range(50):
                assert (await serving.turn(("0", "20", "40", "60")[n % 4])).status_code == 200

        *budgets, _ = await asyncio.gather(*map(one, range(200)), turn())
        assert len(set(budgets)) == 4
        assert serving.state.dial.switches == 49  # it stood at 0 already
        assert sum(serving.state.ledger.running().values()) == 0

    run(go())
