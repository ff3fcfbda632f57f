"""Shared by the tests of serving: an engine's application that echoes, and clients for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import httpx2
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from flexmoe.errors import FlexmoeError
from flexmoe.serve.engine import Engine, ServedMember, ServeSettings
from flexmoe.serve.middleware import ServeMiddleware
from flexmoe.serve.state import ServeState

INSIDE = "engine-name@main"  # what the engine calls the model
SHARES = (0.0, 0.2, 0.4, 0.6)


def run(coroutine):
    """A test's coroutine, which must not wait for ever."""
    return asyncio.run(asyncio.wait_for(coroutine, 20))


class EchoEngine(Engine):
    """Puts the budget into the field ``budget``; notes the switches."""

    model = INSIDE

    def __init__(self):
        self.switched: list[str] = []
        self.kept = 0.0  # the richest budget in memory
        self.broken = False

    def mark(self, body: dict, budget: str) -> dict:
        return {**body, "budget": budget}

    async def on_switch(self, budget: str) -> None:
        await asyncio.sleep(0)
        if self.broken:
            raise RuntimeError("worker is gone")
        self.switched.append(budget)

    async def keep(self, richest: str) -> int:
        await asyncio.sleep(0)
        if self.broken:
            raise FlexmoeError("the checkpoint is gone")
        before, self.kept = self.kept, float(richest)
        return round(10 * (self.kept - before))


def settings(**changes) -> ServeSettings:
    members = tuple(
        ServedMember(
            pruned=s, routed_parameters=round(1000 * (1 - s)), bytes=2000 - round(1000 * s)
        )
        for s in SHARES
    )
    fields = {"model": "family", "name": "moe", "members": members, "default": "0"}
    return ServeSettings(**fields | changes)


class Echo:
    """An engine's application: answers with the budget it was given, and the prompt. What a prompt
    says decides how: ``wait`` until `gate` is open, ``fail``, ``split`` chunks anywhere, ``break``
    with an error in the stream, ``count`` tokens in every event."""

    def __init__(self):
        self.gate = asyncio.Event()
        self.bodies: list[dict] = []
        self.paths: list[str] = []
        routes = [
            Route("/v1/completions", self.complete, methods=["POST"]),
            Route("/v1/chat/completions", self.complete, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", lambda _: PlainTextResponse("ok")),
            Route("/reset", lambda _: PlainTextResponse("reset"), methods=["POST"]),
        ]
        self.app = Starlette(routes=routes)

    async def models(self, _: Request) -> Response:
        entry = {"id": INSIDE, "object": "model", "created": 7, "owned_by": "engine", "max_len": 9}
        return JSONResponse({"object": "list", "data": [entry, {"id": "other", "object": "model"}]})

    async def complete(self, request: Request) -> Response:
        body = await request.json()
        self.bodies.append(body)
        self.paths.append(request.url.path)
        prompt = body.get("prompt", "")
        if "fail" in prompt:
            raise RuntimeError("engine failed")
        if "refuse" in prompt:
            return JSONResponse({"error": {"message": "too long"}, "model": INSIDE}, 400)
        if body.get("stream"):
            return StreamingResponse(self.stream(body, prompt), media_type="text/event-stream")
        if "wait" in prompt:
            await self.gate.wait()
        text = f'{body["budget"]}: {prompt} "model": "{INSIDE}"'
        usage = {"prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8}
        choice = {"index": 0, "text": text}
        return JSONResponse({"model": body["model"], "choices": [choice], "usage": usage})

    async def stream(self, body: dict, prompt: str) -> AsyncIterator[bytes]:
        for n, word in enumerate(["one", "two", "three"]):
            if n == 1 and "wait" in prompt:
                await self.gate.wait()
            choice = {"index": 0, "text": f" {word}"}
            event = {"model": body["model"], "budget": body["budget"], "choices": [choice]}
            if "count" in prompt:
                event["usage"] = {"prompt_tokens": 7, "completion_tokens": n + 1}
            line = f"data: {json.dumps(event, separators=(',', ':'))}\n\n".encode()
            if "split" in prompt:
                for at in range(0, len(line), 7):
                    yield line[at : at + 7]
            else:
                yield line
        if "break" in prompt:
            yield b'data: {"error": "no "memory"\nfor it"}\n\n'  # as transformers writes them
        yield b"data: [DONE]\n\n"


class Serving:
    """A server in this process: the echo behind the middleware, and a client of it."""

    def __init__(self, **changes):
        self.engine, self.echo = EchoEngine(), Echo()
        self.state = ServeState(settings(**changes), self.engine, CollectorRegistry())
        self.app = ServeMiddleware(self.echo.app, self.state)
        transport = httpx2.ASGITransport(app=self.app, raise_app_exceptions=False)
        self.client = httpx2.AsyncClient(transport=transport, base_url="http://server")

    def metric(self, name: str, **labels: str) -> float | None:
        return self.state.ledger.metrics.registry.get_sample_value(name, labels)

    async def complete(self, model: str | None = "moe", prompt: str = "hi", **fields):
        body = {"prompt": prompt, **({} if model is None else {"model": model}), **fields}
        return await self.client.post("/v1/completions", json=body)

    async def turn(self, budget, **fields):
        return await self.client.post("/flexmoe/budget", json={"budget": budget, **fields})


async def until(condition, seconds: float = 5.0) -> None:
    """Wait until ``condition()``; an assertion fails if that takes too long."""
    for _ in range(round(seconds / 0.002)):
        if condition():
            return
        await asyncio.sleep(0.002)
    raise AssertionError("it did not come to that")


def ask_at_once(app, path: str, bodies) -> list[httpx2.Response]:
    """The answers of an application in this process to several requests that wait together."""

    async def go():
        transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            asked = [client.post(path, json=body) for body in bodies]
            return await asyncio.wait_for(asyncio.gather(*asked), 60)

    return asyncio.run(go())
