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
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import CBWorkerDeadError, GenerationState

from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.family import find_folder, load
from flexmoe.premoe import Match, Pattern
from flexmoe.serve import transformers_batch as batching
from flexmoe.serve import transformers_fields as fields
from flexmoe.serve.engine import Engine, ServeSettings
from flexmoe.serve.http import error_body
from flexmoe.serve.middleware import ServeMiddleware
from flexmoe.serve.state import ServeState
from flexmoe.serve.tasks import TaskFinder, beside, load_patterns, widths_of
from flexmoe.serve.transformers_chat import ChatHandler, ResponsesHandler, chat_of
from flexmoe.serve.transformers_clients import ending_with_clients
from flexmoe.serve.transformers_memory import Memory

MODEL = "flexmoe@main"  # in transformers' own form: it adds the revision where there is none
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/health")
CPU_KV_TOKENS = 16384  # of memory shared with the weights not all that is free is taken
CPU_PAGE, CPU_BATCH_TOKENS = 32, 512


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
        self.usual, self.unheeded = fields.usual(generation), fields.unheeded(generation)

    def mark(self, body: dict, budget: str) -> dict:
        body = {name: found for name, found in body.items() if found is not None}
        fields.check(body)
        if not self.chats and ("messages" in body or "input" in body):
            raise FlexmoeError("this model's tokenizer has no chat template: use /v1/completions")
        batching.WISH.set(fields.wish_of(body, self.usual, self.rows.index(budget)))
        return {name: found for name, found in body.items() if name != "top_k"}  # not OpenAI's

    async def retrieve(self, body: dict) -> Match:
        assert self.finder is not None, "a server without tasks has no id that asks for one"
        return await self.finder.find(body)

    async def keep(self, richest: str) -> int:
        assert self.memory is not None, "a server of one budget has no richer one to give back"
        return await asyncio.to_thread(self.memory.keep, self.rows.index(richest))


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
    elif model.device.type == "cuda":  # the current one is asked how large the cache can be
        torch.cuda.set_device(model.device)
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
    batching.try_out(model, experts)
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
    handlers = [kind(manager, generation) for kind in (CompletionHandler, ResponsesHandler)]
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


def assemble(
    settings: ServeSettings, registry: CollectorRegistry = REGISTRY
) -> tuple[ServeMiddleware, GenerationState, int]:
    """The loaded server as an ASGI application, what it generates with (to be shut down), and the
    tokens its KV cache holds."""
    batching.check()
    patterns = load_patterns(settings)
    model, tokenizer, memory = open_model(settings, patterns)
    front = beside(model) if patterns else None
    generation, room = start_batching(model, settings)
    requests: batching.Requests = generation.get_manager(MODEL, use_cb=True)
    finder = None
    if front is not None:
        finder = TaskFinder(front, tokenizer, patterns, requests.room, chat_of)
    chats = tokenizer.chat_template is not None
    rows, generates = settings.budgets.rows, model.generation_config
    engine = TransformersEngine(rows, generates, chats, memory, finder)
    app = ending_with_clients(build(model, tokenizer, generation), requests.forget)
    return ServeMiddleware(app, ServeState(settings, engine, registry)), generation, room


def launch(settings: ServeSettings, say: Callable[[str], None]) -> None:
    """Load, and serve until the process is told to end; ``say`` gets what is known once loaded."""
    app, generation, room = assemble(settings)
    limit = generation.get_manager(MODEL, use_cb=True).room
    say(f"KV cache   room for {room:,} tokens, a request may have {limit:,}")
    engine = app.state.engine
    assert isinstance(engine, TransformersEngine)
    if left_out := engine.unheeded:
        say(f"sampling   without {', '.join(left_out)} of generation_config.json")
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
