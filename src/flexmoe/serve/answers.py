"""An engine's answer on its way to the client: the model's name replaced, tokens counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from flexmoe.serve.http import Headers, Message, Send, without
from flexmoe.serve.ledger import Ledger, Ticket

TEXT = ("content", "reasoning", "reasoning_content", "tool_calls", "refusal")  # of a chat delta


@dataclass(frozen=True)
class Event:
    """What one JSON object of an answer says: pieces of text in it (one for every choice that has
    some), tokens as the engine counted them so far, and whether it reports an error."""

    pieces: int = 0
    prompt: int | None = None
    completion: int | None = None
    error: bool = False


def read_event(found: Any) -> Event:
    """The `Event` of an object of the completions, chat, responses or messages API, in a stream
    or whole."""
    if not isinstance(found, dict):
        return Event()
    kind = str(found.get("type", ""))
    inner = found.get("response") or found.get("message")  # of the first and last event of some
    source = inner if isinstance(inner, dict) else found
    usage = found.get("usage") or source.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    if kind.endswith("delta") and kind != "message_delta":
        pieces = 1
    else:
        choices = found.get("choices")
        pieces = sum(map(_has_text, choices)) if isinstance(choices, list) else 0
    return Event(
        pieces,
        usage.get("prompt_tokens", usage.get("input_tokens")),
        usage.get("completion_tokens", usage.get("output_tokens")),
        bool(found.get("error")) or kind in ("error", "response.failed"),
    )


def _has_text(choice: Any) -> bool:
    if not isinstance(choice, dict):
        return False
    delta = choice.get("delta")
    if isinstance(delta, dict):
        return any(delta.get(name) for name in TEXT)
    return bool(choice.get("text") or choice.get("message"))


class Answer:
    """Stands in for ``send``: passes an answer of the engine on to the client.

    Every ``"model": "INSIDE"`` becomes the id that was ``asked`` for. Replacing bytes is safe:
    inside a JSON string the quotes would be escaped. Of a stream whole lines go on at once and the
    start of a line waits for its end; JSON is passed on whole, with its new length. ``more`` are
    headers to add. ``gone`` says whether the client has left.
    """

    def __init__(
        self,
        send: Send,
        ledger: Ledger,
        ticket: Ticket,
        *,
        inside: str,
        asked: str,
        gone: Callable[[], bool],
        more: Sequence[tuple[bytes, bytes]] = (),
    ):
        self.send, self.ledger, self.ticket, self.more = send, ledger, ticket, more
        self.gone = gone
        self.names = {
            f'"model":{gap}{json.dumps(inside, ensure_ascii=False)}'.encode(): (
                f'"model":{gap}{json.dumps(asked, ensure_ascii=False)}'.encode()
            )
            for gap in ("", " ")
        }
        self.start: Message = {}
        self.kind = b""  # content type
        self.held = b""  # not passed on yet
        self.error = False
        self.ended = False
        self.unread = False  # its end went to nobody

    @property
    def status(self) -> str:
        """How it ended, see `Ledger.close`; empty if it did not."""
        if not self.ended:
            return ""
        if (code := self.start["status"]) >= 400:
            return "refused" if code < 500 else "failed"
        if self.error:
            return "failed"
        return "cancelled" if self.unread else "ok"

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            await self._begin(message)
        elif message["type"] == "http.response.body":
            more = message.get("more_body", False)
            self.unread = self.gone()  # before it is sent: a client that has it all leaves
            await self._body(message.get("body", b""), more)
            self.ended = not more
        else:
            await self.send(message)

    async def _begin(self, message: Message) -> None:
        headers: Headers = list(message.get("headers", []))
        kinds = [value for key, value in headers if key.lower() == b"content-type"]
        self.kind = kinds[0].split(b";")[0].strip() if kinds else b""
        headers += [(b"x-flexmoe-budget", self.ticket.budget.encode()), *self.more]
        self.start = {**message, "headers": headers}
        if self.kind != b"application/json":
            await self.send(self.start)

    async def _body(self, body: bytes, more: bool) -> None:
        if self.kind == b"text/event-stream":
            body, self.held = self.held + body, b""
            if more:
                end = body.rfind(b"\n") + 1
                body, self.held = body[:end], body[end:]
            for line in body.splitlines():
                if line.startswith(b"data:"):
                    self._count(line[5:])
            body = self._rename(body)
        elif self.kind == b"application/json":
            self.held += body
            if more:
                return
            self._count(self.held)
            body = self._rename(self.held)
            length = (b"content-length", str(len(body)).encode())
            headers = without(self.start["headers"], b"content-length")
            await self.send({**self.start, "headers": [*headers, length]})
        if body or not more:
            await self.send({"type": "http.response.body", "body": body, "more_body": more})

    def _rename(self, body: bytes) -> bytes:
        for inside, asked in self.names.items():
            body = body.replace(inside, asked)
        return body

    def _count(self, text: bytes) -> None:
        try:
            event = read_event(json.loads(text))
        except ValueError:  # [DONE], or an error whose text transformers put in as it was
            self.error = self.error or text.strip().startswith(b'{"error"')
            return
        self.error = self.error or event.error
        if event.pieces:
            self.ledger.text(self.ticket, 0 if event.completion is not None else event.pieces)
        self.ledger.usage(self.ticket, event.prompt, event.completion)
