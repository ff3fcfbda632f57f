"""Chats with transformers' handler, where what clients get wrong is said as theirs."""

from __future__ import annotations

from typing import Any

from transformers.cli.serving.chat_completion import ChatCompletionHandler

from flexmoe.errors import FlexmoeError

KINDS: dict[str, tuple[type, str]] = {
    "messages": (list, "a list of messages"),
    "tools": (list, "a list of tools"),
    "chat_template_kwargs": (dict, "an object"),
}
# What transformers ignores with a line in its log, but would change the answer.
IGNORED = (
    "audio", "function_call", "functions", "modalities", "prediction", "reasoning_effort",
    "response_format", "top_logprobs", "web_search_options",
)  # fmt: skip


class ChatHandler(ChatCompletionHandler):
    """Checks a chat and renders its template before anything is queued: what is wrong with it is a
    `FlexmoeError`."""

    async def handle_request(self, body: dict, request_id: str) -> Any:
        self._validate_request(body)
        _check(body)
        _, model, tokenizer = self._resolve_model(body)
        modality = self.model_manager.get_model_modality(model, processor=tokenizer)
        try:
            tokenizer.apply_chat_template(
                self.get_processor_inputs_from_messages(body["messages"], modality),
                tools=body.get("tools"),
                add_generation_prompt=True,
                tokenize=False,
                **(body.get("chat_template_kwargs") or {}),
            )
        except Exception as error:  # a template is a program of the model's, and raises anything
            raise FlexmoeError(
                f"the model's chat template does not take these messages: "
                f"{type(error).__name__}: {error}"
            ) from error
        return await super().handle_request(body, request_id)


def _check(body: dict) -> None:
    for name, (kind, words) in KINDS.items():
        found = body.get(name)
        if found is not None and not isinstance(found, kind):
            raise FlexmoeError(f"{name} must be {words}, found {type(found).__name__}")
    if not body.get("messages"):
        raise FlexmoeError("messages must have at least one message")
    for message in body["messages"]:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise FlexmoeError(f"a message must be an object with a role, found {message!r}")
    ignored = [name for name in IGNORED if body.get(name)]
    if body.get("tool_choice") not in (None, "auto"):
        ignored.append("tool_choice")
    if ignored:
        raise FlexmoeError(f"{ignored[0]} is not supported by --engine transformers: leave it out")
