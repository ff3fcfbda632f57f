"""Chats with transformers' handlers, where what clients get wrong is said as theirs."""

from __future__ import annotations

from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.utils import BaseHandler, Modality

from flexmoe.errors import FlexmoeError

TEXT = ("text", "input_text", "output_text")  # types of parts


def chat_of(body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a chat, or of the responses API, as transformers gives them to the template
    of a text model, and the template's arguments. Raises anything for what is no chat."""
    messages: Any = body.get("messages")
    tools = body.get("tools")
    if "input" in body:
        messages = ResponseHandler._normalize_input(body)
        tools = ResponseHandler._normalize_tools(tools)
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if part["type"] not in TEXT:  # it would be left out without a word
                raise ValueError(f"a part of type '{part['type']}' is no text")
    messages = BaseHandler.get_processor_inputs_from_messages(messages, Modality.LLM)
    return messages, {"tools": tools, **(body.get("chat_template_kwargs") or {})}


def _check_template(handler: BaseHandler, body: dict[str, Any]) -> None:
    """Render the chat before anything is queued: what is wrong with it is a `FlexmoeError`."""
    _, _, tokenizer = handler._resolve_model(body)
    try:
        messages, more = chat_of(body)
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, **more)
    except Exception as error:  # a template is a program of the model's, and raises anything
        raise FlexmoeError(
            f"the model's chat template does not take these messages: "
            f"{type(error).__name__}: {error}"
        ) from error


class ChatHandler(ChatCompletionHandler):
    """``/v1/chat/completions``."""

    async def handle_request(self, body: dict, request_id: str) -> Any:
        self._validate_request(body)
        if not body.get("messages"):
            raise FlexmoeError("messages must have at least one message")
        for message in body["messages"]:
            if not isinstance(message, dict) or not isinstance(message.get("role"), str):
                raise FlexmoeError(f"a message must be an object with a role, found {message!r}")
        _check_template(self, body)
        return await super().handle_request(body, request_id)


class ResponsesHandler(ResponseHandler):
    """``/v1/responses``. What a request leaves out is as OpenAI has it: no stream, and several
    calls of tools in one answer."""

    async def handle_request(self, body: dict, request_id: str) -> Any:
        self._validate_request(body)
        if "prompt" in body:
            raise FlexmoeError("prompt is not supported by --engine transformers: use input")
        found = body.get("input")
        if not found or not isinstance(found, str | list):
            raise FlexmoeError(f"input must be a string or a list of items, found {found!r}")
        for item in found if isinstance(found, list) else ():
            if not isinstance(item, dict):
                raise FlexmoeError(f"an item of input must be an object, found {item!r}")
        _check_template(self, body)
        usual = {"stream": False, "parallel_tool_calls": True}
        return await super().handle_request({**usual, **body}, request_id)
