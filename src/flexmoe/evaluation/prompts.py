"""Prompts to generate from: a file of them, or the beginnings of held-out windows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from flexmoe.data import check_tokens
from flexmoe.errors import FlexmoeError
from flexmoe.jsonl import records

FIELDS = "prompt (text as it is) or messages (a chat), and with messages perhaps tools"
FROM_WINDOWS = 64  # prompts, spread over the data files, where no file of prompts is given
PROMPT_TOKENS = 64  # of a window, at most half of it


@dataclass(frozen=True)
class Prompt:
    """Tokens to go on from; ``tools`` by name, the JSON schema of each one's arguments."""

    ids: list[int]
    tools: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_prompts(path: str | Path, tokenizer: Any, limit: int | None = None) -> list[Prompt]:
    """The first ``limit`` prompts of a ``.jsonl`` or ``.jsonl.gz`` file (None: all).

    An object a line: ``prompt``, text that the model goes on with, or ``messages``, to which the
    chat template is applied, with the line's ``tools`` (in the form that chat templates take:
    OpenAI's). A `FlexmoeError` names the line that is none.
    """
    if limit is not None and limit < 1:
        raise FlexmoeError(f"the number of prompts must be at least 1, found {limit}")
    found = []
    for number, record in records(path, "prompts", FIELDS):
        found.append(_prompt(record, tokenizer, f"{path}, line {number}"))
        if len(found) == limit:
            break
    return found


def _prompt(record: dict[str, Any], tokenizer: Any, where: str) -> Prompt:
    text, messages = record.get("prompt"), record.get("messages")
    tools = _tools(record.get("tools") or [], where)
    if isinstance(text, str) and text and messages is None and not tools:
        return Prompt(tokenizer(text, verbose=False)["input_ids"])
    if not isinstance(messages, list) or not messages or text is not None:
        raise FlexmoeError(f"{where}: expected {FIELDS}; found {list(record)}")
    if not tokenizer.chat_template:
        raise FlexmoeError(
            f"{where} has messages, and the tokenizer has no chat template: give text in 'prompt', "
            "or evaluate a chat model"
        )
    try:
        ids = tokenizer.apply_chat_template(
            messages,
            tools=record.get("tools") or None,
            add_generation_prompt=True,
            return_dict=False,
        )
    except (TemplateError, TypeError, KeyError, AttributeError) as error:
        raise FlexmoeError(f"{where}: the chat template refuses the messages: {error}") from None
    return Prompt(ids, tools)


def _tools(found: Any, where: str) -> dict[str, Mapping[str, Any]]:
    """Schemas of the arguments by name, of ``{"type": "function", "function": {...}}`` each."""
    tools: dict[str, Mapping[str, Any]] = {}
    for tool in found if isinstance(found, list) else [None]:
        function = tool.get("function") if isinstance(tool, dict) else None
        name = function.get("name") if isinstance(function, dict) else None
        schema = (function or {}).get("parameters") or {}
        if not isinstance(name, str) or not isinstance(schema, dict):
            raise FlexmoeError(
                f"{where}: expected tools as a list of "
                '{"type": "function", "function": {"name": ..., "parameters": {JSON schema}}}'
            )
        required = schema.get("required", [])
        if not isinstance(required, list) or not all(isinstance(r, str) for r in required):
            raise FlexmoeError(
                f"{where}: tool '{name}' has {str(required)[:60]} as required arguments, expected "
                "a list of names"
            )
        tools[name] = schema
    return tools


def window_prompts(windows: Mapping[str, Tensor], limit: int | None = None) -> list[Prompt]:
    """The beginnings of ``limit`` windows (None: 64), as many of each data file as there are."""
    if limit is not None and limit < 1:
        raise FlexmoeError(f"the number of prompts must be at least 1, found {limit}")
    rows = max(map(len, windows.values()))
    in_turn = [ids[n] for n in range(rows) for ids in windows.values() if n < len(ids)]
    return [
        Prompt(ids[: min(PROMPT_TOKENS, len(ids) // 2)].tolist())
        for ids in in_turn[: limit or FROM_WINDOWS]
    ]


def check_prompts(prompts: Sequence[Prompt], config: Any, max_new_tokens: int) -> None:
    """`FlexmoeError` where a prompt and its answer do not fit the model's context, or the model
    does not know the tokens."""
    if max_new_tokens < 1:
        raise FlexmoeError(f"max new tokens must be at least 1, found {max_new_tokens}")
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt.ids) for prompt in prompts)
    if context and longest + max_new_tokens > context:
        raise FlexmoeError(
            f"the longest prompt has {longest} tokens and {max_new_tokens} may follow, the model's "
            f"context is {context}: lower --max-new-tokens or shorten the prompt"
        )
    check_tokens(torch.tensor([max(prompt.ids) for prompt in prompts]), config)
