"""The routes of the server's own: ``/flexmoe/*``, the list of models, and metrics."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from flexmoe.errors import FlexmoeError
from flexmoe.serve.http import (
    App,
    Receive,
    Refused,
    Scope,
    Send,
    ask,
    header,
    parse_object,
    read_body,
    send_bytes,
    send_json,
)
from flexmoe.serve.ids import AUTO
from flexmoe.serve.state import ServeState

OWN = "/flexmoe/"
MODELS = "/v1/models"
# the page holds all it needs, and speaks to this server only
PAGE_MAY = (
    b"default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    b"connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    b"frame-ancestors 'none'"
)


async def own_route(
    state: ServeState, path: str, scope: Scope, receive: Receive, send: Send
) -> None:
    """Answer a request below ``/flexmoe/``."""
    method = scope["method"]
    if path == "/flexmoe/budget" and method == "POST":
        await _turn(state, scope, receive, send)
        return
    if path not in ("/flexmoe/budget", "/flexmoe/status", "/flexmoe/ui"):
        raise Refused(404, f"no route {path}; there are /flexmoe/budget, status and ui")
    if method not in ("GET", "HEAD"):
        raise Refused(405, f"{path} does not take {method}")
    if path == "/flexmoe/budget":
        await send_json(send, 200, state.dial_status())
    elif path == "/flexmoe/status":
        await send_json(send, 200, state.status())
    else:
        page = files("flexmoe.serve").joinpath("page.html").read_bytes()
        headers = [(b"content-security-policy", PAGE_MAY)]
        await send_bytes(send, 200, page, b"text/html; charset=utf-8", headers)


async def _turn(state: ServeState, scope: Scope, receive: Receive, send: Send) -> None:
    """``POST /flexmoe/budget``: turn the dial; ``strict`` waits for what runs at other budgets,
    ``release`` gives back the memory of what is beyond the budget."""
    kind = (header(scope, b"content-type") or b"").split(b";")[0].strip()
    if kind != b"application/json":  # which no page of another site can send unasked
        raise Refused(415, "the body must be sent as content-type application/json")
    body = await read_body(scope, receive, state.settings.max_body)
    if body is None:
        return
    wish = _wish(parse_object(body))
    try:
        state.budgets.share(wish.budget)
    except FlexmoeError as error:
        raise Refused(404, str(error), "budget") from None
    if wish.release and state.engine.no_release:
        raise Refused(501, state.engine.no_release, "release")
    async with state.resident.one_at_a_time:
        seconds, freed = await _fulfil(state, wish)
    late = await state.dial.settle(state.settings.strict_timeout) if wish.strict else 0
    if late:
        raise Refused(
            503,
            f"the default is {wish.budget} now, but after {state.settings.strict_timeout:g} s "
            f"there are still {late} requests that began at another",
        )
    await send_json(send, 200, {**state.dial_status(), "seconds": seconds, "freed_bytes": freed})


async def _fulfil(state: ServeState, wish: _Wish) -> tuple[float, int]:
    """Turn the dial; before that, read what a richer budget needs; after it, give back what is
    beyond the budget, if that is wanted. Returns the seconds of the turn and the bytes given back,
    negative for bytes that were read."""
    freed, timeout = 0, state.settings.strict_timeout
    if not state.resident.has(wish.budget):
        whole = wish.budget if wish.release else state.budgets.labels[0]
        try:
            freed = await state.resident.keep(whole, timeout)
        except FlexmoeError as error:
            raise Refused(503, str(error), "budget") from error
    try:
        seconds = await state.dial.turn(wish.budget, "request")
    except Exception as error:
        raise Refused(
            503, f"the engine did not switch, the default is {state.dial.budget}: {error}"
        ) from error
    if wish.release:
        try:
            freed += await state.resident.keep(wish.budget, timeout)
        except Refused as refusal:
            why = f"the default is {wish.budget} now, but {refusal}"
            raise Refused(refusal.code, why) from None
    return seconds, freed


@dataclass(frozen=True)
class _Wish:
    """What ``POST /flexmoe/budget`` asks for."""

    budget: str
    strict: bool
    release: bool


def _wish(body: dict[str, Any]) -> _Wish:
    if unknown := sorted(body.keys() - {"budget", "strict", "release"}):
        raise Refused(
            422, f"unknown field '{unknown[0]}': there are budget, strict and release", unknown[0]
        )
    if not isinstance(budget := body.get("budget"), str):
        raise Refused(422, f'budget must be a string such as "40", found {budget!r}', "budget")
    flags = {name: body.get(name, False) for name in ("strict", "release")}
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise Refused(422, f"{name} must be true or false, found {value!r}", name)
    return _Wish(budget, **flags)


async def models(
    state: ServeState, path: str, app: App, scope: Scope, receive: Receive, send: Send
) -> None:
    """``GET /v1/models`` and ``/v1/models/ID``: what the engine lists, and an entry a budget."""
    status, body = await ask(app, {**scope, "path": MODELS, "raw_path": MODELS.encode()}, receive)
    if status != 200:
        await send_bytes(send, status, body, b"application/json")
        return
    listed: list[dict[str, Any]] = []
    for entry in json.loads(body)["data"]:
        listed += _entries(state, entry) if entry["id"] == state.engine.model else [entry]
    if path == MODELS:
        await send_json(send, 200, {"object": "list", "data": listed})
        return
    wanted = path.removeprefix(f"{MODELS}/")
    found = next((entry for entry in listed if entry["id"] == wanted), None)
    if found is None:
        raise Refused(404, str(_unknown(state, wanted)), "model")
    await send_json(send, 200, found)


def _entries(state: ServeState, entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The engine's entry under the name served, and one for each budget and task, listed as
    adapters are: ``root`` and ``parent`` are the model they belong to."""
    budgets, shown = state.budgets, {"pruned", "routed_parameters", "bytes"}
    figures: dict[str, dict[str, Any]] = {
        budgets.id(member.budget): member.model_dump(include=shown)
        for member in state.settings.members
    }
    for task in state.settings.tasks:
        figures[budgets.id(task.task)] = task.model_dump(include={"task", *shown})
    figures[budgets.id(AUTO)] = {"tasks": list(budgets.tasks)}
    default = {**entry, "id": budgets.name, "flexmoe": {"default": state.dial.budget}}
    keep = {key: entry[key] for key in ("object", "created", "owned_by") if key in entry}
    return [default] + [
        {"id": name, **keep, "root": budgets.name, "parent": budgets.name, "flexmoe": figures[name]}
        for name in budgets.ids[1:]
    ]


def _unknown(state: ServeState, model_id: str) -> FlexmoeError:
    try:
        state.budgets.find(model_id)
    except FlexmoeError as error:
        return error
    return FlexmoeError(f"the engine does not list its model, asked for '{model_id}'")


async def metrics(state: ServeState, send: Send) -> None:
    """``GET /metrics`` for engines that have none."""
    body = generate_latest(state.ledger.metrics.registry)
    await send_bytes(send, 200, body, CONTENT_TYPE_LATEST.encode())
