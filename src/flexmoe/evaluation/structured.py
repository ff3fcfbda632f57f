"""Structured answers: do they parse as JSON, and do tool calls name a tool and fit its schema?"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flexmoe.evaluation.generate import Answer
from flexmoe.evaluation.health import share
from flexmoe.evaluation.prompts import Prompt

FENCE = re.compile(r"```(?:json)?\s*\n(.*)\n\s*```", re.DOTALL)
BROKEN = (ValueError, RecursionError)  # a model that loops opens a thousand brackets


def is_json(text: str) -> bool:
    """Whether all of an answer is a JSON object or list, but for white space and one code fence
    around it."""
    text = text.strip()
    if fenced := FENCE.fullmatch(text):
        text = fenced[1]
    try:
        found = json.loads(text)
    except BROKEN:
        return False
    return isinstance(found, dict | list)


def calls_tool(text: str, tools: Mapping[str, Mapping[str, Any]]) -> bool:
    """Whether an answer has tool calls that all name one of ``tools`` (by name the JSON schema of
    the arguments) and give every argument that it requires.

    A call is a JSON object with ``name`` and ``arguments`` (or ``parameters``), wherever it
    stands in the answer: the form of Qwen's, Hermes', Mistral's and Llama's templates.
    """
    calls = [found for found in _objects(text) if "name" in found]
    return bool(calls) and all(_fits(call, tools) for call in calls)


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in a text."""
    decoder, at = json.JSONDecoder(), text.find("{")
    while at >= 0:
        try:
            found, stop = decoder.raw_decode(text, at)
        except BROKEN:
            stop = at + 1
        else:
            yield found
        at = text.find("{", stop)


def _fits(call: Mapping[str, Any], tools: Mapping[str, Mapping[str, Any]]) -> bool:
    name = call["name"]
    arguments = call.get("arguments", call.get("parameters"))
    if isinstance(arguments, str):  # OpenAI's own form has them as text
        try:
            arguments = json.loads(arguments)
        except BROKEN:
            return False
    if not isinstance(name, str) or name not in tools or not isinstance(arguments, dict):
        return False
    return set(tools[name].get("required", ())) <= set(arguments)


def structured_row(prompts: Sequence[Prompt], found: Sequence[Answer], tokenizer: Any) -> dict:
    """Shares (see `share`) of the answers that are ``valid``; of them, those to prompts without
    tools that parse (``text``), and those to prompts with tools that make a call that fits
    (``tools``); None where there are no such prompts. An answer that never ended is not valid."""
    good: dict[str, list[bool]] = {"text": [], "tools": []}
    for prompt, answer in zip(prompts, found, strict=True):
        if prompt.tools:
            # some templates mark calls by special tokens: what is between them is looked at
            text = tokenizer.decode(answer.ids, skip_special_tokens=False)
            good["tools"].append(answer.ended and calls_tool(text, prompt.tools))
        else:
            text = tokenizer.decode(answer.ids, skip_special_tokens=True)
            good["text"].append(answer.ended and is_json(text))
    row: dict[str, Any] = {
        kind: share(sum(hits), len(hits)) if hits else None for kind, hits in good.items()
    }
    hits = good["text"] + good["tools"]
    return {"valid": share(sum(hits), len(hits)), **row}
