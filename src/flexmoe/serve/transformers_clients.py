"""Requests in front of transformers' server: ids of our own, an end when the client leaves, and
the last line of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from uuid import uuid4

from flexmoe.serve.http import App, Message, Receive, Scope, Send, error_body, send_json, without

ID = b"x-request-id"
# OpenAI's streams end with this, but for those of its responses API; transformers' do not
DONE, WITH_DONE = b"data: [DONE]\n\n", ("/v1/completions", "/v1/chat/completions")


def ending_with_clients(app: App, forget: Callable[[str], None]) -> App:
    """``app``, which by itself computes an unstreamed answer to its end, whoever still waits for
    it, and keeps something of every stream that was left. ``forget`` ends a request by its id,
    which is ours: it tells requests apart, and two clients could give the same."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await app(scope, receive, send)
            return
        name = str(uuid4())
        messages: asyncio.Queue[Message] = asyncio.Queue(maxsize=1)

        async def listen() -> None:
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    forget(name)
                await messages.put(message)

        began = streams = False

        async def noting(message: Message) -> None:
            nonlocal began, streams
            began = True
            if message["type"] == "http.response.start":
                kind = dict(message["headers"]).get(b"content-type", b"")
                streams = kind.startswith(b"text/event-stream") and scope["path"] in WITH_DONE
            elif streams and not message.get("more_body", False):
                message = {**message, "body": message.get("body", b"") + DONE}
            await send(message)

        headers = [*without(scope["headers"], ID), (ID, name.encode())]
        listening = asyncio.create_task(listen())
        try:
            await app({**scope, "headers": headers}, messages.get, noting)
        except asyncio.CancelledError:  # the server ends, and has waited long enough
            if not began:
                await send_json(send, 503, error_body(503, "the server is ending"))
        finally:
            listening.cancel()
            forget(name)

    return wrapped
