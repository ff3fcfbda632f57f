"""The ASGI middleware: one application in front of an engine's own."""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from flexmoe.errors import FlexmoeError
from flexmoe.serve import routes
from flexmoe.serve.answers import Answer
from flexmoe.serve.http import (
    App,
    Headers,
    Message,
    Receive,
    Refused,
    Scope,
    Send,
    header,
    parse_object,
    read_body,
    send_json,
    without,
)
from flexmoe.serve.ids import AUTO, label
from flexmoe.serve.metrics import NO_BUDGET, NO_TASK
from flexmoe.serve.state import ServeState

if TYPE_CHECKING:
    from flexmoe.premoe import Match

# The routes that generate, whose bodies are JSON with a field ``model``.
GENERATING = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"})
SAFE = frozenset({"GET", "HEAD", "OPTIONS"})


class ServeMiddleware:
    """Serves budgets on top of ``app``, an engine's application with OpenAI's routes.

    Model ids become budgets and tasks (see `flexmoe.serve.ids`), requests that name none are pinned
    to the default when they arrive, and ``/flexmoe/*`` reads and turns the dial. With an API key,
    ``/v1`` and whatever else is not a plain reading request needs it.
    """

    def __init__(self, app: App, state: ServeState):
        self.app, self.state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.state.start()
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, send)
            finally:
                self.state.stop()
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        try:
            self._check_key(path, scope)
            if scope["type"] == "http":
                await self._http(path, scope, receive, send)
            else:
                await self.app(scope, receive, send)
        except Refused as refusal:
            await self._refuse(refusal, path, scope, send)

    async def _http(self, path: str, scope: Scope, receive: Receive, send: Send) -> None:
        method = scope["method"]
        if path in GENERATING and method == "POST":
            await self._generate(scope, receive, send)
        elif path.startswith(routes.OWN):
            await routes.own_route(self.state, path, scope, receive, send)
        elif method == "GET" and (path == routes.MODELS or path.startswith(f"{routes.MODELS}/")):
            await routes.models(self.state, path, self.app, scope, receive, send)
        elif method == "GET" and path == "/metrics" and not self.state.engine.has_metrics:
            await routes.metrics(self.state, send)
        else:
            await self.app(scope, receive, send)

    def _check_key(self, path: str, scope: Scope) -> None:
        key = self.state.settings.api_key
        reading = scope["type"] == "http" and scope["method"] in SAFE
        if key is None or (reading and not f"{path}/".startswith("/v1/")):
            return
        if scope["type"] == "http" and scope["method"] == "OPTIONS":  # asked without keys (CORS)
            return
        found = header(scope, b"authorization") or b""
        if not hmac.compare_digest(found, b"Bearer " + key.encode()):
            raise Refused(401, "this route needs the header 'Authorization: Bearer API-KEY'")

    async def _refuse(self, refusal: Refused, path: str, scope: Scope, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": str(refusal)})
            return
        if path in GENERATING:
            self.state.ledger.metrics.requests.labels(NO_BUDGET, "refused").inc()
        headers = [(b"www-authenticate", b"Bearer")] if refusal.code == 401 else []
        if refusal.code == 413:  # the rest of the body is not going to be read
            headers.append((b"connection", b"close"))
        await send_json(send, refusal.code, refusal.body, headers)

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self.state
        raw = await read_body(scope, receive, state.settings.max_body)
        if raw is None:
            return
        body = parse_object(raw)
        asked, budget, follows = self._budget(body)
        try:
            found: Headers = []
            if budget == AUTO:
                budget, found = self._found(await state.engine.retrieve(body))
            marked = state.engine.mark({**body, "model": state.engine.model}, budget)
        except FlexmoeError as error:
            raise Refused(400, str(error)) from None
        request = _Request(json.dumps(marked).encode(), receive)
        ticket = state.ledger.open(budget, follows=follows, streamed=body.get("stream") is True)
        names = {"inside": state.engine.model, "asked": asked}
        answer = Answer(send, state.ledger, ticket, gone=lambda: request.gone, more=found, **names)
        try:
            await self.app(request.scope(scope), request.receive, answer)
        finally:
            unfinished = "cancelled" if request.gone else "failed"
            state.ledger.close(ticket, answer.status or unfinished)

    def _budget(self, body: Mapping[str, Any]) -> tuple[str, str, bool]:
        """The id that was asked for, its budget, task or `AUTO`, and whether that is the default of
        this moment."""
        asked = body.get("model")
        if asked is None:
            asked = self.state.budgets.name
        if not isinstance(asked, str):
            raise Refused(400, f"model must be a string, found {type(asked).__name__}", "model")
        try:
            row = self.state.budgets.find(asked)
        except FlexmoeError as error:
            raise Refused(404, str(error), "model") from None
        if row is not None and row != AUTO:
            self.state.resident.check(row)
        return asked, self.state.dial.budget if row is None else row, row is None

    def _found(self, match: Match) -> tuple[str, Headers]:
        """What a request runs at whose task was looked for, the full model where none is near, and
        headers that say how near."""
        self.state.ledger.metrics.retrieved.labels(match.task or NO_TASK).inc()
        say = {
            "task": match.task or NO_TASK,
            "nearest": match.nearest,
            "distance": f"{match.distance:.4g}",
            "reach": f"{match.reach:.4g}",
        }
        headers = [(f"x-flexmoe-{name}".encode(), value.encode()) for name, value in say.items()]
        return match.task or label(0.0), headers


class _Request:
    """A request with another body. ``gone``: the client went away while it was answered."""

    def __init__(self, body: bytes, receive: Receive):
        self.body, self.client, self.sent, self.gone = body, receive, False, False

    def scope(self, scope: Scope) -> Scope:
        """The scope for this body, and for an answer that is not compressed: it is read here."""
        dropped = (b"content-length", b"transfer-encoding", b"accept-encoding")
        length = (b"content-length", str(len(self.body)).encode())
        return {**scope, "headers": [*without(scope["headers"], *dropped), length]}

    async def receive(self) -> Message:
        """The body, then what comes from the client."""
        if not self.sent:
            self.sent = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        message = await self.client()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message
