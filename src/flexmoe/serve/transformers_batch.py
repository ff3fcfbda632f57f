"""Where flexmoe reaches into transformers' continuous batching, all of it.

Three things are added to a `ContinuousBatchingManager`: every request keeps the `Wish` it came
with, every batch tells the experts the budget of each of its tokens, and every row of logits is
sampled as its request wished (transformers has one setting for all requests).

Written for transformers 5.23; `check` looks for what is used of it before a model is loaded.
"""

from __future__ import annotations

import asyncio
import inspect
import queue
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig, PreTrainedModel
from transformers.cli.serving.utils import GenerationState

from flexmoe.errors import FlexmoeError

KEY = "flexmoe"  # of the wish among a request's settings, which survive when it is set back
TESTED = "5.23"


@dataclass(frozen=True)
class Wish:
    """What one request asks for: ``budget``, its row in the width tables (a
    budget's or a task's); ``temperature``, 0 for
    the likeliest token; ``top_p``, the share of probability to draw from."""

    budget: int
    temperature: float
    top_p: float


# Set where a request is read, taken where transformers queues it: the same asyncio context.
WISH: ContextVar[Wish] = ContextVar("flexmoe_wish")


def check() -> None:
    """`FlexmoeError` unless this transformers has what is used here."""
    from transformers.generation.continuous_batching import continuous_api, input_outputs
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    manager = continuous_api.ContinuousBatchingManager
    needed = [
        (manager.add_request, "input_ids"),
        (manager.warmup, "self"),
        (manager._create_batch_processor, "self"),
        (input_outputs.ContinuousBatchingIOs.prepare_batch_tensors, "requests_in_batch"),
        (ModelRunner._sample, "output_ids"),
    ]
    for function, argument in needed:
        if argument not in inspect.signature(function).parameters:
            raise _other_version(f"{function.__qualname__} has no argument {argument}")


def _other_version(what: str) -> FlexmoeError:
    return FlexmoeError(
        f"transformers {transformers.__version__} is not the {TESTED} that --engine transformers "
        f"was written for ({what}): pip install 'transformers=={TESTED}.*', or use --engine vllm"
    )


class _Inbox(queue.Queue):
    """The manager's queue of new requests. Called in the event loop.

    A request enters once the function that adds it has registered where its answer goes: an answer
    that is quicker would be lost. What cannot be answered is refused here: in the queue it would
    end the manager.
    """

    def __init__(self, room: int, wake_up: Any):
        super().__init__()
        self.room, self.wake_up = room, wake_up

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        prompt, wanted = len(item.initial_tokens), item.max_new_tokens or 0
        if not prompt:
            raise FlexmoeError("the prompt is empty: it has no tokens")
        if wanted < 1:
            raise FlexmoeError(f"max_tokens must be at least 1, found {wanted}")
        if prompt + wanted > self.room:
            raise FlexmoeError(
                f"the prompt's {prompt} tokens and max_tokens {wanted} do not fit into the KV "
                f"cache of {self.room} tokens: ask for fewer (max_tokens), or serve with a larger "
                "--kv-tokens"
            )
        item.logit_processor_kwargs[KEY] = WISH.get()
        asyncio.get_running_loop().call_soon(self._enter, item)

    def _enter(self, item: Any) -> None:
        super().put(item)
        self.wake_up.set()


class _Batch:
    """The wishes of the batch that is computed next."""

    def __init__(self, experts: Sequence[nn.Module], device: torch.device):
        self.experts, self.device = experts, device
        self.rows: list[Wish] = []  # one for each row of logits

    def see(self, requests: Sequence[Any]) -> None:
        """Tell the experts the budgets of the tokens of ``requests``."""
        wishes = [request.state.logit_processor_kwargs[KEY] for request in requests]
        self.rows = [w for w, r in zip(wishes, requests, strict=True) if r.has_new_token]
        budgets = [
            wish.budget
            for wish, request in zip(wishes, requests, strict=True)
            for _ in range(request.query_length)
        ]
        token_budget_T = torch.tensor(budgets, dtype=torch.int32, device=self.device)
        for module in self.experts:
            module.flexmoe_token_budget_T = token_budget_T

    def sample(self, scores_1nV: Tensor, output_ids: Tensor) -> None:
        """Take the place of the runner's own function of this signature."""
        scores_nV = scores_1nV[0]
        token_n = scores_nV.argmax(-1)
        drawn = [n for n, wish in enumerate(self.rows) if wish.temperature > 0]
        if drawn:
            temperature = [self.rows[n].temperature for n in drawn]
            top_p = [self.rows[n].top_p for n in drawn]
            token_n[drawn] = draw(
                scores_nV[drawn], scores_nV.new_tensor(temperature), scores_nV.new_tensor(top_p)
            )
        output_ids[0, : len(token_n)].copy_(token_n)


def draw(scores_nV: Tensor, temperature_n: Tensor, top_p_n: Tensor) -> Tensor:
    """A token [n] for each row, from the fewest tokens whose probability at the row's temperature
    reaches its ``top_p`` (nucleus sampling, arXiv:1904.09751)."""
    share_nV = (scores_nV / temperature_n[:, None]).softmax(-1)
    share_nV, token_nV = share_nV.sort(-1, descending=True)
    out_nV = share_nV.cumsum(-1) - share_nV >= top_p_n[:, None]
    out_nV[:, 0] = False  # at top_p 0 too
    kept_nV = share_nV.masked_fill(out_nV, 0)
    return token_nV.gather(-1, kept_nV.multinomial(1))[:, 0]


def start(
    model: PreTrainedModel,
    name: str,
    ends: GenerationConfig,
    config: ContinuousBatchingConfig,
    experts: Sequence[nn.Module],
) -> tuple[GenerationState, int]:
    """Start to batch for ``model``, called ``name``; its batches tell ``experts`` their budgets
    (none for a model of one budget). Returns what transformers' server generates with, and the
    tokens its KV cache holds."""
    manager = model.init_continuous_batching(ends, config)
    manager.warmup()  # makes the cache
    processor = manager.batch_processor
    config = manager.continuous_batching_config
    room = config.num_blocks * config.page_size
    manager.input_queue = processor.input_queue = _Inbox(room, manager._wake_up_loop)
    manager.logit_processor.supported_keys[KEY] = Wish
    batch = _Batch(experts, manager.model.device)
    tensors = processor.inputs_and_outputs
    tensors.prepare_batch_tensors = _seeing(tensors.prepare_batch_tensors, batch)
    processor.model_runner._sample = batch.sample
    manager.start()
    state = GenerationState(continuous_batching=True)
    # else a manager is made at the first request, with the settings of that
    state.get_manager(name, use_cb=True)._cb = manager
    return state, room


def _seeing(prepare: Callable[..., None], batch: _Batch) -> Callable[..., None]:
    """Preparing and computing a batch follow each other in one thread, so the batch that was seen
    last is the one computed next."""

    def prepared(requests_in_batch: Sequence[Any], **others: Any) -> None:
        prepare(requests_in_batch=requests_in_batch, **others)
        batch.see(requests_in_batch)

    return prepared
