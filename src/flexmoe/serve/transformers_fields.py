"""The fields of a request, whatever its route: which continuous batching heeds, and how a token is
to be drawn. What it would ignore without a word is refused."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from flexmoe.errors import FlexmoeError
from flexmoe.serve.transformers_batch import Wish

GREEDY_BELOW = 0.01  # temperatures at which only the likeliest token has a chance
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
# What would be ignored, and the values of each that ask for nothing.
IGNORED: dict[str, tuple[Any, ...]] = {
    "generation_config": (), "stop": ([], ""), "n": (1,), "best_of": (1,), "echo": (False,),
    "logprobs": (False,), "top_logprobs": (0,), "logit_bias": ({},),
    "frequency_penalty": (0,), "presence_penalty": (0,),
    # of chats
    "audio": (), "modalities": ([], ["text"]), "prediction": (), "reasoning_effort": (),
    "response_format": ({"type": "text"},), "web_search_options": (),
    "functions": ([],), "function_call": (), "tool_choice": ("auto",),
    "parallel_tool_calls": (True,),
    # of the responses API
    "text": ({}, {"format": {"type": "text"}}), "reasoning": ({},), "background": (False,),
    "previous_response_id": (), "conversation": (),
}  # fmt: skip
# What a response may be asked to include, and never has here: of OpenAI's own tools, and of images.
ABSENT = (
    "file_search_call.results", "web_search_call.results", "web_search_call.action.sources",
    "code_interpreter_call.outputs", "computer_call_output.output.image_url",
    "message.input_image.image_url",
)  # fmt: skip
KINDS: dict[str, tuple[type, str]] = {
    "messages": (list, "a list of messages"),
    "tools": (list, "a list of tools"),
    "chat_template_kwargs": (dict, "an object"),
    "include": (list, "a list"),
    "instructions": (str, "a string"),
    "suffix": (str, "a string"),
    "stream": (bool, "true or false"),
}
# of `chat_template_kwargs`: the tokenizer's own, and not the template's
TAKEN = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
# Of a model's generation_config.json, with the values that do nothing: see `unheeded`.
UNHEEDED: dict[str, tuple[Any, ...]] = {"min_p": (None, 0), "repetition_penalty": (None, 1)}


def check(body: dict[str, Any]) -> None:
    """`FlexmoeError` for a field that would be ignored, or is of the wrong kind."""
    for name, found in body.items():
        if name not in IGNORED or (name == "parallel_tool_calls" and not body.get("tools")):
            continue  # without tools there are no calls
        nothing = IGNORED[name]
        # to Python true is 1, and false 0
        if not any(found == x and isinstance(found, bool) == isinstance(x, bool) for x in nothing):
            raise FlexmoeError(f"{name} is not supported by --engine transformers: leave it out")
    for name, (kind, words) in KINDS.items():
        if name in body and not isinstance(body[name], kind):
            raise FlexmoeError(f"{name} must be {words}, found {type(body[name]).__name__}")
    for what in body.get("include", []):
        if what not in ABSENT:
            raise FlexmoeError(
                f"include {what!r} is not supported by --engine transformers: leave it out"
            )
    for tool in body.get("tools", []):  # others would reach the template as functions
        if not isinstance(tool, dict) or tool.get("type", "function") != "function":
            raise FlexmoeError(f"a tool must be an object of type 'function', found {tool!r}")
    if taken := sorted(body.get("chat_template_kwargs", {}).keys() & TAKEN):
        raise FlexmoeError(f"chat_template_kwargs go to the template: leave {taken[0]} out")
    for name in LIMITS:
        _whole(body, name, 1, None)
    _whole(body, "seed", -(2**63), 2**64 - 1)


def usual(generation: GenerationConfig) -> Wish:
    """How the model's own generation_config.json draws, at the richest budget."""
    if not generation.do_sample:
        return Wish(budget=0, temperature=0.0, top_p=1.0, top_k=0)
    return Wish(
        budget=0,
        temperature=generation.temperature or 1.0,
        top_p=generation.top_p or 1.0,
        top_k=generation.top_k or 0,
    )


def unheeded(generation: GenerationConfig) -> list[str]:
    """What the model's own generation_config.json asks for and does not get."""
    found = {name: getattr(generation, name, None) for name in UNHEEDED}
    return [f"{name} {value:g}" for name, value in found.items() if value not in UNHEEDED[name]]


def wish_of(body: dict[str, Any], usual: Wish, budget: int) -> Wish:
    """The request's own wish, in this row of the width tables; what it leaves out is as
    ``usual``."""
    temperature = _number(body, "temperature", usual.temperature, 0, 2)
    return replace(
        usual,
        budget=budget,
        temperature=temperature if temperature >= GREEDY_BELOW else 0.0,
        top_p=_number(body, "top_p", usual.top_p, 0, 1),
        top_k=_whole(body, "top_k", 0, None, usual.top_k),
        limited=any(name in body for name in LIMITS),
    )


def _number(body: dict[str, Any], name: str, default: float, low: float, high: float) -> float:
    found = body.get(name, default)
    if type(found) not in (int, float) or not low <= found <= high:
        raise FlexmoeError(f"{name} must be a number from {low} to {high}, found {found!r}")
    return float(found)


def _whole(body: dict[str, Any], name: str, low: int, high: int | None, default: int = 0) -> int:
    if name not in body:
        return default
    found = body[name]
    if type(found) is not int or found < low or (high is not None and found > high):
        bound = "on" if high is None else f"to {high}"
        raise FlexmoeError(f"{name} must be a whole number from {low} {bound}, found {found!r}")
    return found
