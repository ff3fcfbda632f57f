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
from transformers.cli.serving.utils import CBGenerateManager, CBWorkerDeadError, GenerationState
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from flexmoe.errors import FlexmoeError

KEY = "flexmoe"  # of the wish among a request's settings, which survive when it is set back
TESTED = "5.23"


@dataclass(frozen=True)
class Wish:
    """What one request asks for: ``budget``, its row in the width tables (a budget's or a task's);
    ``temperature``, 0 for the likeliest token; ``top_p``, the share of probability to draw from;
    ``top_k``, the likeliest tokens to draw from, 0 for all; ``limited``: it says how long its
    answer may be."""

    budget: int
    temperature: float
    top_p: float
    top_k: int = 0
    limited: bool = True


# Set where a request is read, taken where transformers queues it: the same asyncio context.
WISH: ContextVar[Wish] = ContextVar("flexmoe_wish")


def check() -> None:
    """`FlexmoeError` unless this transformers has what is used here."""
    from transformers.generation.continuous_batching import continuous_api, input_outputs

    try:
        from transformers.generation.continuous_batching.model_runner import (
            ModelRunner,
            infer_max_single_request_tokens,
        )
    except ImportError as error:
        raise _other_version(str(error)) from error
    manager = continuous_api.ContinuousBatchingManager
    needed = [
        (manager.add_request, "input_ids"),
        (manager.warmup, "self"),
        (manager._create_batch_processor, "self"),
        (input_outputs.ContinuousBatchingIOs.prepare_batch_tensors, "requests_in_batch"),
        (ModelRunner._sample, "output_ids"),
        (infer_max_single_request_tokens, "cache"),
        (manager.stop, "hard_stop"),
        (manager.cancel_request, "request_id"),
        (continuous_api.OutputRouter.fail_and_deliver, "error"),
        (continuous_api.BackgroundThreadStatus.can_accept_new_requests, "self"),
        (CBGenerateManager.generate_streaming, "gen_config"),
        (CBGenerateManager.generate_non_streaming, "gen_config"),
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
    end the manager. ``room``: tokens that a request may have; ``bound``: what bounds them.
    """

    def __init__(self, manager: Any, room: int, bound: str):
        super().__init__()
        self.manager, self.room, self.bound = manager, room, bound

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        prompt, wanted = len(item.initial_tokens), item.max_new_tokens or 0
        if not prompt:
            raise FlexmoeError("the prompt is empty: it has no tokens")
        if wanted < 1:
            raise FlexmoeError(f"max_tokens must be at least 1, found {wanted}")
        if prompt + wanted > self.room:
            raise FlexmoeError(
                f"the prompt's {prompt} tokens and max_tokens {wanted} do not fit into {self.bound}"
            )
        item.logit_processor_kwargs[KEY] = WISH.get()
        asyncio.get_running_loop().call_soon(self._enter, item)

    def _enter(self, item: Any) -> None:
        super().put(item)
        self.manager._wake_up_loop.set()
        if why := self.manager.background_thread_status.can_accept_new_requests():
            # it may have looked into the queue for the last time
            self.manager.output_router.fail_and_deliver(item, CBWorkerDeadError(why))


class _Unread(queue.Queue):
    """Where the manager puts outputs that nobody waits for: nothing would ever take them out."""

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        pass


class Requests(CBGenerateManager):
    """What transformers' handlers ask of a running ``manager``. ``room``: tokens that a request
    may have; one that does not say how long its answer may be has what its prompt leaves."""

    def __init__(self, manager: Any, room: int):
        super().__init__()
        self._cb, self.room = manager, room

    def generate_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *others: Any, **more: Any
    ) -> Any:
        self._bound(inputs, gen_config)
        return super().generate_streaming(model, processor, inputs, gen_config, *others, **more)

    async def generate_non_streaming(
        self, model: Any, processor: Any, inputs: Any, gen_config: Any, *others: Any, **more: Any
    ) -> Any:
        self._bound(inputs, gen_config)
        return await super().generate_non_streaming(
            model, processor, inputs, gen_config, *others, **more
        )

    def _bound(self, inputs: Any, gen_config: GenerationConfig) -> None:
        if not WISH.get().limited:
            left = max(1, self.room - len(inputs["input_ids"]))
            gen_config.max_new_tokens = min(gen_config.max_new_tokens, left)

    def forget(self, request_id: str) -> None:
        """End a request whose client has left, with an empty answer; one that has ended is left
        alone. Called in the event loop."""
        router = self._cb.output_router
        with router._lock:
            handler, _ = router.result_handlers.pop(request_id, (None, None))
        if handler is not None:
            self._cb.cancel_request(request_id)
            handler(GenerationOutput(request_id, status=RequestStatus.FINISHED))

    def stop(self) -> None:
        """At once. The event loop that answers would go to may be closed."""
        self._cb.output_router.result_handlers.clear()
        self._cb.stop(block=True, timeout=10, hard_stop=True)


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
            top_k = [self.rows[n].top_k for n in drawn]
            token_n[drawn] = draw(
                scores_nV[drawn],
                scores_nV.new_tensor(temperature),
                scores_nV.new_tensor(top_p),
                torch.tensor(top_k, device=scores_nV.device),
            )
        output_ids[0, : len(token_n)].copy_(token_n)


def draw(scores_nV: Tensor, temperature_n: Tensor, top_p_n: Tensor, top_k_n: Tensor) -> Tensor:
    """A token [n] for each row, of its ``top_k`` likeliest (0: of all) from the fewest whose
    probability among them, at the row's temperature, reaches its ``top_p`` (nucleus sampling,
    arXiv:1904.09751)."""
    scores_nV, token_nV = scores_nV.sort(-1, descending=True)
    rank_V = torch.arange(scores_nV.shape[-1], device=scores_nV.device)
    beyond_nV = (top_k_n[:, None] > 0) & (rank_V >= top_k_n[:, None])
    scores_nV = (scores_nV / temperature_n[:, None]).masked_fill(beyond_nV, -torch.inf)
    share_nV = scores_nV.softmax(-1)
    out_nV = share_nV.cumsum(-1) - share_nV >= top_p_n[:, None]
    out_nV[:, 0] = False  # at top_p 0 too
    kept_nV = share_nV.masked_fill(out_nV, 0)
    return token_nV.gather(-1, kept_nV.multinomial(1))[:, 0]


@torch.no_grad()
def try_out(model: PreTrainedModel, experts: Sequence[nn.Module]) -> None:
    """One token at the richest budget: what cannot run (a kernel that was forced) raises now, and
    does not end the worker at the first request."""
    token_1 = torch.zeros(1, dtype=torch.int32, device=model.device)
    for module in experts:
        module.flexmoe_token_budget_T = token_1
    model(token_1[None].long(), use_cache=False)


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
    room, bound = _room(model, processor.cache)
    manager.input_queue = processor.input_queue = _Inbox(manager, room, bound)
    manager.output_router.output_queue = _Unread()
    manager.add_request = _answering(manager.add_request)
    manager.logit_processor.supported_keys[KEY] = Wish
    batch = _Batch(experts, manager.model.device)
    tensors = processor.inputs_and_outputs
    tensors.prepare_batch_tensors = _seeing(tensors.prepare_batch_tensors, batch)
    processor.model_runner._sample = batch.sample
    manager.start()
    state = GenerationState(continuous_batching=True)
    # else a manager is made at the first request, with the settings of that
    state._cb_manager, state._cb_model_id = Requests(manager, room), name
    return state, config.num_blocks * config.page_size


def _room(model: PreTrainedModel, cache: Any) -> tuple[int, str]:
    """The tokens that one request may have, and what bounds them. Layers with a sliding window
    share the blocks of a cache with the others, so that its size says little."""
    from transformers.generation.continuous_batching.model_runner import (
        infer_max_single_request_tokens,
    )

    room = infer_max_single_request_tokens(cache)
    if room < 2:  # a token of a prompt, and one of its answer
        raise ValueError("its KV cache has no room for one request")
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions and positions < room:
        return positions, f"the model's {positions} positions: ask for fewer (max_tokens)"
    return room, (
        f"the KV cache of {room} tokens for a request: ask for fewer (max_tokens), or serve with "
        "a larger --kv-tokens"
    )


def _answering(add: Callable[..., str | None]) -> Callable[..., str]:
    """While the manager ends it drops requests without a word, and they would wait for ever."""

    def added(*args: Any, **more: Any) -> str:
        request_id = add(*args, **more)
        if request_id is None:
            raise CBWorkerDeadError("the server is ending, or its worker did: nothing is taken in")
        return request_id

    return added


def _seeing(prepare: Callable[..., None], batch: _Batch) -> Callable[..., None]:
    """Preparing and computing a batch follow each other in one thread, so the batch that was seen
    last is the one computed next."""

    def prepared(requests_in_batch: Sequence[Any], **others: Any) -> None:
        prepare(requests_in_batch=requests_in_batch, **others)
        batch.see(requests_in_batch)

    return prepared
