"""Tasks of a pattern store, served beside budgets: whose they are, the widths they keep, and which
one a prompt needs.

A pattern drops whole experts, so that it is a row of the width tables like a budget: width 0 for
those that go and all channels for those that stay, in whatever order a family has them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmoe.errors import FlexmoeError
from flexmoe.family import find_folder
from flexmoe.headers import EXPORT_NAME
from flexmoe.plan import JSON_NAME, Recipe, read_manifest
from flexmoe.premoe import Match, Pattern, Store, compile_plan, retrieve
from flexmoe.premoe.store import fingerprint_of
from flexmoe.serve.engine import ServedMember, ServedTask, ServeSettings


def served_tasks(
    model: str, patterns: str, keep: float, members: tuple[ServedMember, ...]
) -> tuple[ServedTask, ...]:
    """The tasks of the store ``patterns`` on the model or family at ``model``; a `FlexmoeError`
    where its patterns are of other weights, or there is no full model to fall back to."""
    store, folder = Store(patterns), find_folder(model)
    found = store.load_all()
    family = (folder / JSON_NAME).is_file()
    if members[0].pruned or (folder / EXPORT_NAME).is_file():
        raise FlexmoeError(
            "--patterns needs the full model, which answers where no task is near: serve the model "
            "itself or a family, with budget 0 among --budgets"
        )
    check_store(store, model, read_manifest(folder).recipe if family else None)
    tasks = []
    for pattern in found:
        plan = compile_plan([pattern], keep)
        figures = plan.member(plan.budgets[-1])
        tasks.append(
            ServedTask(
                task=pattern.task,
                pruned=figures.pruned,
                routed_parameters=figures.routed_parameters,
                bytes=figures.bytes,
            )
        )
    return tuple(tasks)


def check_store(store: Store, model: str, recipe: Recipe | None) -> None:
    """`FlexmoeError` unless the patterns of ``store`` are of the weights of ``model``; of those it
    was made from where it has the ``recipe`` of a family or plan."""
    if recipe is not None and recipe.recovery:
        raise FlexmoeError(
            f"'{model}' has recovered weights, and patterns are of those it was made from: serve "
            "that family, or the model itself"
        )
    store.check_weights(fingerprint_of(model) if recipe is None else recipe.weights_sha256, model)


def load_patterns(settings: ServeSettings) -> list[Pattern]:
    """The patterns of the tasks that are served."""
    if settings.patterns is None:
        return []
    return Store(settings.patterns).load_all([task.task for task in settings.tasks])


def widths_of(pattern: Pattern, keep: float) -> dict[int, Tensor]:
    """Channels of every expert [E] that a task keeps, by layer: all or none."""
    plan = compile_plan([pattern], keep)
    return plan.widths(plan.budgets[-1])


def beside(model: PreTrainedModel) -> PreTrainedModel:
    """Modules of their own that share the weights of ``model``: it is computing meanwhile. To be
    made before anything is done to its attention."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    plan = model.__dict__.get("flexmoe_plan")
    return deepcopy(model, {**shared, id(plan): plan})


class TaskFinder:
    """Finds the pattern that a request's prompt needs, from the first MoE layer's router in
    ``model``, of which no more than what stands before that layer's experts is computed.

    ``room``: tokens that a prompt may have (None: any number); ``chat``: the messages of a request,
    and the other arguments of the chat template, as the engine gives them to it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        patterns: list[Pattern],
        room: int | None,
        chat: Callable[[dict[str, Any]], tuple[list[dict[str, Any]], dict[str, Any]]],
    ):
        self.model, self.tokenizer, self.patterns = model, tokenizer, patterns
        self.room, self.chat = room, chat
        self.one_at_a_time = asyncio.Lock()

    async def find(self, body: dict[str, Any]) -> Match:
        """The match of a request's prompt; a `FlexmoeError` if it has none that can be read."""
        ids = torch.tensor(self.tokens(body), dtype=torch.long)
        if not len(ids):
            raise FlexmoeError("the prompt is empty: it has no tokens")
        if self.room is not None and len(ids) > self.room:  # one is looked at, and others wait
            raise FlexmoeError(
                f"the prompt has {len(ids)} tokens, and a request may have {self.room}"
            )
        async with self.one_at_a_time:
            return await asyncio.to_thread(retrieve, self.model, self.patterns, ids)

    def tokens(self, body: dict[str, Any]) -> list[int]:
        """The tokens of a request's prompt: of completions, of a chat, or of the responses API."""
        prompt = body.get("prompt")
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if isinstance(prompt, list) and all(type(token) is int for token in prompt):
            size = self.model.get_input_embeddings().num_embeddings
            if unknown := [token for token in prompt if not 0 <= token < size]:
                raise FlexmoeError(f"token {unknown[0]} is none of the model's {size}")
            return prompt
        if isinstance(prompt, list):
            raise FlexmoeError("the task is found for one prompt: send the others on their own")
        if not body.get("messages", body.get("input")):
            raise FlexmoeError("no prompt was found in the request, whose task is looked for")
        try:
            messages, more = self.chat(body)
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **more
            )
        except Exception as error:  # of the model's own template, on what a client sent
            raise FlexmoeError(f"the messages do not fit the chat template: {error}") from error
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]
