"""Small things of HTTP over ASGI: bounded bodies, JSON answers, errors in OpenAI's form."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

TYPES = {
    401: "AuthenticationError",
    404: "NotFoundError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}


def error_body(code: int, message: str, param: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it."""
    kind = TYPES.get(code, "BadRequestError")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Refused(Exception):
    """A request that is answered with an error: HTTP status ``code``, and which field of the
    request is to blame, if one is."""

    def __init__(self, code: int, message: str, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param

    @property
    def body(self) -> dict[str, Any]:
        """The answer's body."""
        return error_body(self.code, str(self), self.param)


def header(scope: Scope, name: bytes) -> bytes | None:
    """The value of a request's header (``name`` in lower case), None where it is absent."""
    return next((value for key, value in scope["headers"] if key == name), None)


def without(headers: Iterable[tuple[bytes, bytes]], *names: bytes) -> Headers:
    """The headers but those of ``names``."""
    return [(key, value) for key, value in headers if key.lower() not in names]


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The body of a request, None if the client went away before its end; `Refused` (413) where
    it is longer than ``limit`` bytes, without reading on."""
    too_long = Refused(413, f"the body is longer than the {limit:,} bytes that are allowed")
    length = header(scope, b"content-length") or b""
    if length.isdigit() and int(length) > limit:
        raise too_long
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > limit:
            raise too_long
        if not message.get("more_body", False):
            return bytes(body)


def parse_object(body: bytes) -> dict[str, Any]:
    """A JSON object that can be written again; `Refused` (400) for anything else."""
    try:
        found = json.loads(body)
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise Refused(400, f"the body is not valid JSON: {error}") from None
    if not isinstance(found, dict):
        raise Refused(400, f"the body must be a JSON object, found {type(found).__name__}")
    return found


async def send_bytes(
    send: Send, status: int, body: bytes, content_type: bytes, headers: Headers | None = None
) -> None:
    """A whole answer at once."""
    own = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": own + (headers or [])})
    await send({"type": "http.response.body", "body": body})


async def send_json(send: Send, status: int, content: Any, headers: Headers | None = None) -> None:
    """A whole answer of JSON."""
    await send_bytes(send, status, json.dumps(content).encode(), b"application/json", headers)


async def ask(app: App, scope: Scope, receive: Receive) -> tuple[int, bytes]:
    """What ``app`` answers to a request: status and whole body."""
    status, body = 500, bytearray()

    async def send(message: Message) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        elif message["type"] == "http.response.body":
            body.extend(message.get("body", b""))

    await app(scope, receive, send)
    return status, bytes(body)
