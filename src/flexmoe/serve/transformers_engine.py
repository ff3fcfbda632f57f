"""``flexmoe serve --engine transformers``: transformers' own server and continuous batching.

Requests of different budgets share a batch. KV blocks are never shared between requests: the same
prompt has other keys and values at another budget.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import REGISTRY, CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.requests import Request
from transformers import (
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.model_manager import ModelManager, TimedModel
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBWorkerDeadError, GenerationState

from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.family import find_folder, load
from flexmoe.premoe import Match, Pattern
from flexmoe.serve import transformers_batch as batching
from flexmoe.serve.engine import Engine, ServeSettings
from flexmoe.serve.http import App, Receive, Scope, Send, error_body, without
from flexmoe.serve.middleware import ServeMiddleware
from flexmoe.serve.state import ServeState
from flexmoe.serve.tasks import TaskFinder, beside, load_patterns, widths_of
from flexmoe.serve.transformers_chat import ChatHandler
from flexmoe.serve.transformers_memory import Memory

MODEL = "flexmoe@main"  # in transformers' own form: it adds the revision where there is none
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/health")
CPU_KV_TOKENS = 16384  # of memory shared with the weights not all that is free is taken
CPU_PAGE, CPU_BATCH_TOKENS = 32, 512
GREEDY_BELOW = 0.01  # temperatures at which only the likeliest token has a chance
# What continuous batching would ignore without a word, and values that ask for nothing.
IGNORED = (
    "stop", "n", "best_of", "echo", "logprobs", "frequency_penalty", "presence_penalty",
    "generation_config",
)  # fmt: skip
NOTHING: tuple[Any, ...] = (None, False, 0, 1, [], "")
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


class TransformersEngine(Engine):
    """transformers, as the middleware sees it: the budget goes along in the asyncio context."""

    model = MODEL

    def __init__(
        self,
        rows: tuple[str, ...],
        generation: GenerationConfig,
        chats: bool,
        memory: Memory | None = None,
        finder: TaskFinder | None = None,
    ):
        self.rows, self.chats, self.memory, self.finder = rows, chats, memory, finder
        if finder is not None:
            self.no_release = "tasks need every channel of their experts: serve without --patterns"
        sampled = bool(generation.do_sample)
        self.temperature = (generation.temperature or 1.0) if sampled else 0.0
        self.top_p = (generation.top_p or 1.0) if sampled else 1.0

    def mark(self, body: dict, budget: str) -> dict:
        for name in IGNORED:
            if body.get(name) not in NOTHING:
                raise FlexmoeError(
                    f"{name} is not supported by --engine transformers: leave it out"
                )
        for name in LIMITS:
            limit = body.get(name)
            if limit is not None and (type(limit) is not int or limit < 1):
                raise FlexmoeError(f"{name} must be a whole number from 1 on, found {limit!r}")
        if not self.chats and ("messages" in body or "input" in body):
            raise FlexmoeError("this model's tokenizer has no chat template: use /v1/completions")
        temperature = _number(body, "temperature", self.temperature, 0, 2)
        batching.WISH.set(
            batching.Wish(
                budget=self.rows.index(budget),
                temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
                top_p=_number(body, "top_p", self.top_p, 0, 1),
            )
        )
        return body

    async def retrieve(self, body: dict) -> Match:
        assert self.finder is not None, "a server without tasks has no id that asks for one"
        return await self.finder.find(body)

    async def keep(self, richest: str) -> int:
        assert self.memory is not None, "a server of one budget has no richer one to give back"
        return await asyncio.to_thread(self.memory.keep, self.rows.index(richest))


def _number(body: dict, name: str, default: float, low: float, high: float) -> float:
    found = body.get(name)
    if found is None:
        return default
    if type(found) not in (int, float) or not low <= found <= high:
        raise FlexmoeError(f"{name} must be a number from {low} to {high}, found {found!r}")
    return float(found)


def open_model(
    settings: ServeSettings, patterns: Sequence[Pattern]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, Memory | None]:
    """The model, with the widths of all budgets and tasks beside its experts modules; its
    tokenizer; and the `Memory` of one with several budgets or tasks, which holds what the richest
    needs."""
    folder = find_folder(settings.model)
    shares = [member.pruned for member in settings.members]
    dtype = settings.dtype if settings.dtype == "auto" else getattr(torch, settings.dtype)
    model = load(
        folder,
        shares[0] if len(shares) == 1 else None,
        base=settings.base,
        device=settings.device,
        dtype=dtype,
    )
    plan, memory = getattr(model, "flexmoe_plan", None), None
    if plan or patterns:
        full = {layer.index: torch.full((layer.E,), layer.I) for layer in expert_layers(model)}
        widths = [plan.widths(share) if plan and share else full for share in shares]
        widths += [widths_of(pattern, settings.keep) for pattern in patterns]
        memory = Memory(model, widths)
        if shares[0]:
            memory.keep(0)
        if len(widths) > 1:
            model.set_experts_implementation("flexmoe")
    return model, AutoTokenizer.from_pretrained(model.name_or_path), memory


def start_batching(model: PreTrainedModel, settings: ServeSettings) -> tuple[GenerationState, int]:
    """transformers' generation state with a running manager, and the tokens its KV cache holds."""
    sizes: dict[str, int] = {}
    tokens = settings.kv_tokens
    if model.device.type == "cpu":
        sizes = {"page_size": CPU_PAGE, "max_batch_tokens": CPU_BATCH_TOKENS}
        tokens = tokens or CPU_KV_TOKENS
    config = ContinuousBatchingConfig(allow_block_sharing=False, use_cuda_graph=False, **sizes)
    if tokens is not None:
        config.num_blocks = math.ceil(tokens / config.page_size)
    # one setting for all requests: how to end; how to sample goes by request
    ends = GenerationConfig(
        do_sample=False,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=model.generation_config.pad_token_id,
    )
    several = len(settings.budgets.rows) > 1
    experts = [layer.module for layer in expert_layers(model)] if several else []
    try:
        return batching.start(model, MODEL, ends, config, experts)
    except (ValueError, MemoryError, AttributeError, NotImplementedError) as error:
        raise FlexmoeError(
            f"transformers cannot batch this model continuously ({error}): use --engine vllm, or "
            "another --kv-tokens"
        ) from error


def build(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    generation: GenerationState,
) -> FastAPI:
    """transformers' application for this one model, without what would load or drop models."""
    manager = ModelManager(model_timeout=-1)
    manager.force_model = MODEL
    manager.loaded_models[MODEL] = TimedModel(model, timeout_seconds=-1, processor=tokenizer)
    handlers = [kind(manager, generation) for kind in (CompletionHandler, ResponseHandler)]
    app = build_server(
        manager,
        ChatHandler(manager, generation),
        *handlers,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=generation,
    )
    app.router.routes[:] = [r for r in app.router.routes if getattr(r, "path", "") in ROUTES]
    entry = {"id": MODEL, "object": "model", "created": int(time.time()), "owned_by": "flexmoe"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [entry]}

    def answer_with(kind: type[Exception], code: int | None = None) -> None:
        async def handler(_: Request, error: Any) -> JSONResponse:
            status = code or error.status_code
            text = str(getattr(error, "detail", "") or error) or type(error).__name__
            return JSONResponse(error_body(status, text), status)

        app.add_exception_handler(kind, handler)

    answer_with(HTTPException)
    answer_with(FlexmoeError, 400)
    answer_with(CBWorkerDeadError, 503)
    answer_with(Exception, 500)
    return app


def own_request_ids(app: App) -> App:
    """``app`` without ids that clients give their requests: it tells requests apart by them, and
    two could give the same."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            scope = {**scope, "headers": without(scope["headers"], b"x-request-id")}
        await app(scope, receive, send)

    return wrapped


def assemble(
    settings: ServeSettings, registry: CollectorRegistry = REGISTRY
) -> tuple[ServeMiddleware, GenerationState, int]:
    """The loaded server as an ASGI application, what it generates with (to be shut down), and the
    tokens its KV cache holds."""
    batching.check()
    patterns = load_patterns(settings)
    model, tokenizer, memory = open_model(settings, patterns)
    finder = TaskFinder(beside(model), tokenizer, patterns) if patterns else None
    generation, room = start_batching(model, settings)
    chats = tokenizer.chat_template is not None
    rows, generates = settings.budgets.rows, model.generation_config
    engine = TransformersEngine(rows, generates, chats, memory, finder)
    app = own_request_ids(build(model, tokenizer, generation))
    return ServeMiddleware(app, ServeState(settings, engine, registry)), generation, room


def launch(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Load, and serve until the process is told to end; ``say`` gets what is known once loaded."""
    app, generation, room = assemble(settings)
    say(f"KV cache   room for {room:,} tokens")
    try:
        uvicorn.run(
            app,
            host=settings.host,
            port=settings.port,
            log_level="warning",
            timeout_graceful_shutdown=10,
        )
    finally:
        generation.shutdown()
