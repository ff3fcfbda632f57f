"""Budgets as model ids and the dial, in front of vLLM's own routes.

vLLM finds `FlexmoeEndpoint` through the entry point ``vllm.endpoint_plugins`` and loads it in the
API server where ``VLLM_PLUGINS`` names it; ``flexmoe serve`` sees to that, see `launch`.
"""

from __future__ import annotations

import os
from argparse import Namespace
from contextlib import ExitStack
from typing import Any

import torch
from transformers import AutoTokenizer

from flexmoe.errors import FlexmoeError
from flexmoe.family import find_weights
from flexmoe.premoe import Match
from flexmoe.premoe.signature import front
from flexmoe.serve.engine import Engine, ServeSettings
from flexmoe.serve.middleware import ServeMiddleware
from flexmoe.serve.state import ServeState
from flexmoe.serve.tasks import TaskFinder, load_patterns
from flexmoe.serve.vllm import requests
from flexmoe.serve.vllm.chat import vllm_chat_of
from flexmoe.serve.vllm.compat import BUDGET

SETTINGS = "FLEXMOE_SERVE"  # environment variable that holds `ServeSettings` as JSON


class VllmEngine(Engine):
    """vLLM, as the middleware sees it. `flexmoe.serve.vllm.requests` reads what `mark` writes, and
    salts the prefix cache with it."""

    has_metrics = True
    no_release = (
        "--engine vllm cannot give memory back while it runs: start it with --budgets that leave "
        "the richer ones out, or serve with --engine transformers"
    )

    def __init__(self, model: str, finder: TaskFinder | None = None):
        self.model, self.finder = model, finder

    def mark(self, body: dict, budget: str) -> dict:
        if body.get("use_beam_search"):
            raise FlexmoeError(
                "use_beam_search is not supported: vLLM's beams are requests of their own, which "
                "lose the budget. Leave it out"
            )
        given = body.get("vllm_xargs")
        if given is not None and not isinstance(given, dict):
            raise FlexmoeError(f"vllm_xargs must be an object, found {type(given).__name__}")
        return {**body, "vllm_xargs": {**(given or {}), BUDGET: budget}}

    async def retrieve(self, body: dict) -> Match:
        assert self.finder is not None, "a server without tasks has no id that asks for one"
        return await self.finder.find(body)

    async def on_switch(self, budget: str) -> None:
        requests.set_default(budget)  # for what comes in by other routes than the marked ones


class FlexmoeEndpoint:
    """vLLM's contract for plug-ins that add routes."""

    name = "flexmoe_api"
    required_tasks = None

    settings: ServeSettings

    def __init__(self) -> None:
        self.held = ExitStack()  # as long as this process

    def attach_router(self, app: Any) -> None:
        text = os.environ.get(SETTINGS)
        if text is None:
            raise FlexmoeError(f"{SETTINGS} is not set: start the server with flexmoe serve")
        self.settings = ServeSettings.model_validate_json(text)
        requests.set_default(self.settings.default)
        engine = VllmEngine(self.settings.name, self._finder())
        state = ServeState(self.settings, engine)
        app.add_middleware(ServeMiddleware, state=state)

    def _finder(self) -> TaskFinder | None:
        """The finder of tasks. The model is in other processes: its embeddings, and what else
        stands before the first experts, are in this one a second time, in float32."""
        if self.settings.patterns is None:
            return None
        weights = find_weights(self.settings.model, self.settings.base)
        model = self.held.enter_context(front(weights, torch.device("cpu")))
        tokenizer = AutoTokenizer.from_pretrained(weights)
        room = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        return TaskFinder(model, tokenizer, load_patterns(self.settings), room, vllm_chat_of)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """`FlexmoeError` unless the engine serves the budgets that are offered: an option of
        vLLM's own may have taken the place of ours."""
        run = getattr(engine_client, "vllm_config", None)
        rows = getattr(getattr(run, "quant_config", None), "rows", None)
        offered = self.settings.budgets.rows
        if tuple(rows or offered[:1]) != offered:
            raise FlexmoeError(
                f"{', '.join(offered)} are offered, and vLLM serves "
                f"{', '.join(rows) if rows else 'one size only'}: leave options out that change "
                "the model's config (--config, --hf-overrides)"
            )
