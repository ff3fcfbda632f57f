"""--engine transformers: chats through a template, at every budget, whole and as a stream."""

import json
import shutil

import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import AutoTokenizer

from chat import MESSAGES, TEMPLATE, TOOLS
from flexmoe.data import TINY
from flexmoe.serve.prepare import make_settings
from flexmoe.serve.transformers_engine import assemble
from helpers import random_plan
from serving import ask_at_once
from zoo import tiny_model

CHAT, COMPLETE, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
BUDGETS = ("0", "20", "40", "60")
NEW = 12


class Chats:
    """A server in this process, with a tokenizer that has a chat template."""

    def __init__(self, root):
        model = tiny_model("qwen3_moe", vocab_size=4096)
        model.config.max_position_embeddings = 4096
        model.generation_config.eos_token_id = None
        with torch.no_grad():  # else it repeats itself, whatever it was asked
            model.lm_head.weight.normal_(0, 1, generator=torch.Generator().manual_seed(3))
            model.model.norm.weight.fill_(1)
        model.save_pretrained(root / "base")
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY / "model" / file, root / "base")
        self.tokenizer = AutoTokenizer.from_pretrained(root / "base")
        self.tokenizer.chat_template = TEMPLATE
        self.tokenizer.save_pretrained(root / "base")
        random_plan(model, root / "base").save(root / "plan")
        settings = make_settings(
            str(root / "plan"),
            name="moe",
            host="127.0.0.1",
            port=18397,
            api_key=None,
            kv_tokens=4096,
            base=None,
            device="cpu",
            dtype="float32",
        )
        self.app, self.generation, _ = assemble(settings, CollectorRegistry())

    def post(self, path, *bodies):
        return ask_at_once(self.app, path, bodies)

    def expected(self, budget, **more):
        """What the completions route says after the rendered prompt."""
        prompt = self.tokenizer.apply_chat_template(
            MESSAGES, add_generation_prompt=True, tokenize=False, **more
        )
        body = {"model": f"moe:{budget}", "prompt": prompt, "max_tokens": NEW}
        (answer,) = self.post(COMPLETE, body)
        return answer.json()["choices"][0]["text"].strip()  # as answers to chats are


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    chats = Chats(tmp_path_factory.mktemp("chats"))
    yield chats
    chats.generation.shutdown()


def chat(model, **more):
    return {"model": model, "messages": MESSAGES, "max_tokens": NEW, **more}


def said(answer):
    """Text of a whole answer, or of the events of a stream."""
    if "event-stream" not in answer.headers["content-type"]:
        return answer.json()["choices"][0]["message"]["content"].strip()
    lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") for x in lines for choice in json.loads(x)["choices"]]
    return "".join(piece or "" for piece in pieces).strip()


def test_a_chat_at_every_budget_is_the_completion_of_its_prompt(chats):
    wanted = [chats.expected(budget) for budget in BUDGETS]
    assert len(set(wanted)) == len(BUDGETS)
    for stream in (False, True):
        bodies = [chat(f"moe:{budget}", stream=stream) for budget in BUDGETS]
        answers = chats.post(CHAT, *bodies)
        assert [answer.status_code for answer in answers] == [200] * len(BUDGETS)
        assert [answer.headers["x-flexmoe-budget"] for answer in answers] == list(BUDGETS)
        assert [said(answer) for answer in answers] == wanted
        assert all(f'"moe:{b}"' in answer.text for b, answer in zip(BUDGETS, answers, strict=True))


def test_tools_reach_the_template(chats):
    (answer,) = chats.post(CHAT, chat("moe:40", tools=TOOLS, tool_choice="auto"))
    assert said(answer) == chats.expected("40", tools=TOOLS) != chats.expected("40")


def test_responses_are_whole_unless_a_stream_is_asked_for(chats):
    bodies = [
        {"model": "moe:40", "input": MESSAGES, "max_output_tokens": NEW, **more}
        for more in ({}, {"stream": None}, {"stream": True})
    ]
    whole, null, stream = chats.post(RESPONSES, *bodies)
    assert whole.json()["parallel_tool_calls"] is True
    (output,) = whole.json()["output"]
    assert output["content"][0]["text"].strip() == chats.expected("40")
    assert null.json()["output"][0]["content"] == output["content"]
    assert "event-stream" in stream.headers["content-type"]


USER = {"role": "user", "content": "hi"}
BAD = [
    ({"messages": [USER, USER]}, "roles must alternate"),
    ({"messages": []}, "at least one message"),
    ({}, "at least one message"),
    ({"messages": "hi"}, "messages must be a list of messages, found str"),
    ({"messages": ["hi"]}, "a message must be an object with a role, found 'hi'"),
    ({"messages": [{"content": "hi"}]}, "a message must be an object with a role"),
    ({"messages": [USER], "tools": {"a": 1}}, "tools must be a list of tools, found dict"),
    ({"messages": [USER], "tool_choice": "required"}, "tool_choice is not supported"),
    ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format is not"),
    ({"messages": [USER], "chat_template_kwargs": 3}, "chat_template_kwargs must be an object"),
    ({"messages": [USER], "stream": True, "model": "moe:30"}, "moe:40"),
]


BAD_RESPONSES = [
    ({}, "input must be a string or a list of items, found None"),
    ({"input": []}, "found []"),
    ({"input": 5}, "found 5"),
    ({"input": [3]}, "an item of input must be an object, found 3"),
    ({"input": [USER, USER]}, "roles must alternate"),
    ({"input": [{"type": "computer_call"}]}, "a part of type 'computer_call' is no text"),
    ({"input": "hi", "tools": {"a": 1}}, "tools must be a list of tools, found dict"),
    ({"input": "hi", "prompt": {"id": "p"}}, "prompt is not supported"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD_RESPONSES)
def test_what_is_wrong_with_a_response_is_said(chats, wrong, message):
    (answer,) = chats.post(RESPONSES, {"model": "moe", **wrong})
    assert answer.status_code == 400 and message in answer.json()["error"]["message"]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_what_is_wrong_with_a_chat_is_said(chats, wrong, message):
    (answer,) = chats.post(CHAT, {"model": "moe", **wrong})
    assert answer.status_code in (400, 404), answer.text
    assert message in answer.json()["error"]["message"]
    assert chats.generation.is_cb_alive()
