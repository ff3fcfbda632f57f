"""What a chat is to vLLM's template, for who reads the prompt in front of vLLM."""

from __future__ import annotations

from typing import Any


def vllm_chat_of(body: dict[str, Any]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a chat, or of the responses API, and the template's arguments, much as vLLM
    gives them: parts of text become lines. Raises anything for what is no chat."""
    messages: Any = body.get("messages", body.get("input"))
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if body.get("instructions"):
        messages = [{"role": "system", "content": body["instructions"]}, *messages]
    messages = [{**message, "content": _text(message.get("content"))} for message in messages]
    return messages, {"tools": body.get("tools"), **(body.get("chat_template_kwargs") or {})}


def _text(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return "\n".join(part if isinstance(part, str) else part["text"] for part in content)
