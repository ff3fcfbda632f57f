"""--engine transformers: fields that are heeded and refused, how long a request may be, and how it
ends: its client leaves, the worker dies, the server is stopped."""

import asyncio
import json
import math
import time
from types import SimpleNamespace

import pytest
from transformers import ContinuousBatchingConfig, GenerationConfig, GptOssForCausalLM

from chat import TOOLS
from flexmoe.errors import FlexmoeError
from flexmoe.serve import transformers_batch as batching
from flexmoe.serve import transformers_fields as fields
from flexmoe.serve.transformers_engine import MODEL, TransformersEngine
from flexmoe.serve.transformers_fields import ABSENT
from serving import until
from test_serve_middleware import client
from test_serve_transformers import PROMPTS, Server, body, expected, made  # noqa: F401
from zoo import tiny_config

SAMPLED = GenerationConfig(
    do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.05, min_p=0.0
)
ENGINE = TransformersEngine(("0", "20"), SAMPLED, True)


@pytest.fixture(scope="module")
def server(made):  # noqa: F811
    server = Server(made[0] / "plan")
    yield server
    server.generation.shutdown()


def requests_of(server):
    return server.generation.get_manager(MODEL, use_cb=True)


WRONG = [
    ({"frequency_penalty": 1}, "frequency_penalty is not supported"),
    ({"presence_penalty": 1.0}, "presence_penalty is not supported"),
    ({"logprobs": 1}, "logprobs is not supported"),
    ({"logprobs": True}, "logprobs is not supported"),
    ({"echo": True}, "echo is not supported"),
    ({"stop": True}, "stop is not supported"),
    ({"n": True}, "n is not supported"),
    ({"best_of": 2}, "best_of is not supported"),
    ({"logit_bias": {"5": 100}}, "logit_bias is not supported"),
    ({"logit_bias": 3}, "logit_bias is not supported"),
    ({"text": {"format": {"type": "json_object"}}}, "text is not supported"),
    ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
    ({"conversation": "x"}, "conversation is not supported"),
    ({"background": True}, "background is not supported"),
    ({"top_logprobs": 3}, "top_logprobs is not supported"),
    ({"tool_choice": "required"}, "tool_choice is not supported"),
    ({"reasoning": {"effort": "high"}}, "reasoning is not supported"),
    ({"parallel_tool_calls": False, "tools": TOOLS}, "parallel_tool_calls is not supported"),
    ({"include": ["message.output_text.logprobs"]}, "include 'message.output_text.logprobs' is"),
    ({"include": [ABSENT[0], "reasoning.encrypted_content"]}, "include 'reasoning.encrypted_con"),
    ({"include": "reasoning.encrypted_content"}, "include must be a list, found str"),
    ({"tools": [{"type": "web_search"}]}, "object of type 'function', found {'type': 'web_search"),
    ({"tools": ["add"]}, "a tool must be an object of type 'function', found 'add'"),
    ({"seed": "abc"}, "seed must be a whole number from .* found 'abc'"),
    ({"seed": 2**70}, "seed must be a whole number"),
    ({"suffix": 3}, "suffix must be a string, found int"),
    ({"stream": "true"}, "stream must be true or false, found str"),
    ({"instructions": 5}, "instructions must be a string, found int"),
    ({"chat_template_kwargs": {"tokenize": True}}, "go to the template: leave tokenize out"),
    ({"temperature": math.nan}, "temperature must be a number from 0 to 2, found nan"),
    ({"top_k": -1}, "top_k must be a whole number from 0 on, found -1"),
    ({"top_k": 2.5}, "top_k must be a whole number"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_fields_that_would_be_ignored_or_are_wrong_are_refused(wrong, message):
    with pytest.raises(FlexmoeError, match=message):
        ENGINE.mark(wrong, "20")


def test_fields_that_ask_for_nothing_pass_and_null_is_left_out():
    nothing = {"n": 1, "best_of": 1, "echo": False, "logprobs": False, "frequency_penalty": 0.0}
    nothing |= {"stop": [], "logit_bias": {}, "tool_choice": "auto", "response_format": None}
    nothing |= {"text": {"format": {"type": "text"}}, "chat_template_kwargs": None, "seed": 7}
    nothing |= {"include": list(ABSENT), "parallel_tool_calls": False, "tools": []}
    found = ENGINE.mark({**nothing, "top_k": 3}, "20")
    ENGINE.mark({"tools": TOOLS, "parallel_tool_calls": True, "include": []}, "20")
    assert found == {name: value for name, value in nothing.items() if value is not None}


def test_what_is_left_out_is_as_in_the_models_own_settings():
    ENGINE.mark({"prompt": "a"}, "20")
    assert batching.WISH.get() == batching.Wish(1, 0.6, 0.9, 20, limited=False)
    ENGINE.mark({"prompt": "a", "top_k": 0, "top_p": 1, "max_tokens": 3}, "0")
    assert batching.WISH.get() == batching.Wish(0, 0.6, 1.0, 0, limited=True)
    assert fields.usual(GenerationConfig(top_k=20)).top_k == 0  # which does not sample
    assert fields.unheeded(SAMPLED) == ["repetition_penalty 1.05"]


def test_the_likeliest_of_one_is_greedy(server, expected):  # noqa: F811
    hot = body("20", PROMPTS[0], temperature=2, top_k=1)
    assert server.text(hot) == [expected["20", PROMPTS[0]]]


def test_layers_with_a_window_share_the_cache_with_the_others():
    """One request may have less than the cache holds; else it would end the worker."""
    config = tiny_config("gpt_oss")
    config.num_hidden_layers, config.sliding_window = 5, 4096
    config.layer_types = ["sliding_attention"] * 3 + ["full_attention"] * 2
    config.max_position_embeddings = 4096
    sizes = ContinuousBatchingConfig(
        allow_block_sharing=False, use_cuda_graph=False, page_size=32, num_blocks=7
    )
    model = GptOssForCausalLM(config).eval()
    ends = GenerationConfig(do_sample=False, eos_token_id=-1)
    state, tokens = batching.start(model, "m", ends, sizes, [])
    requests = state.get_manager("m", use_cb=True)
    inbox, cache = requests._cb.input_queue, requests._cb.batch_processor.cache
    state.shutdown()
    assert (requests.room, tokens) == (192, 224)
    item = SimpleNamespace(initial_tokens=[1] * 100, max_new_tokens=100)
    with pytest.raises(FlexmoeError, match="into the KV cache of 192 tokens for a request"):
        inbox.put(item)
    sizes.num_blocks = 1
    with pytest.raises(ValueError, match="no room for one request"):
        batching.start(model, "m", ends, sizes, [])
    config.max_position_embeddings = 64
    assert batching._room(model, cache) == (
        64,
        "the model's 64 positions: ask for fewer (max_tokens)",
    )


def test_an_answer_without_a_limit_ends_where_the_room_does(made):  # noqa: F811
    server = Server(made[0] / "plan", kv_tokens=32)
    (answer,) = server.ask({"model": "moe:20", "prompt": "the"})
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["total_tokens"] == 32
    assert answer.json()["choices"][0]["finish_reason"] == "length"
    server.generation.shutdown()


def test_a_kernel_that_cannot_run_is_refused_before_it_serves(made, monkeypatch):  # noqa: F811
    monkeypatch.setattr("flexmoe.kernels.interface.FORCED", "triton")
    with pytest.raises(FlexmoeError, match="'triton' was asked for and cannot run"):
        Server(made[0] / "plan")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_ends_when_its_client_leaves(server, stream):
    requests = requests_of(server)

    async def go():
        long = json.dumps(body("20", "the", max_tokens=2000, stream=stream)).encode()
        answer, gone = client(server.app, long, [])
        await until(lambda: requests.scheduler.active_requests)
        gone.set()
        await answer
        await until(lambda: not requests.scheduler.active_requests)

    asyncio.run(asyncio.wait_for(go(), 20))
    router, ticket = requests._cb.output_router, server.app.state.ledger.recent[-1]
    assert not router.result_handlers and router.output_queue.empty()
    assert ticket.status == "cancelled" and ticket.tokens < 2000


def test_no_request_waits_for_a_worker_that_died_or_ends(made):  # noqa: F811
    server = Server(made[0] / "plan")
    manager = requests_of(server)._cb
    enter = manager.input_queue._enter

    def after_its_death(item):
        manager._handle_critical_error(RuntimeError("boom"), manager.batch_processor)
        enter(item)

    manager.input_queue._enter = after_its_death
    (answer,) = server.ask(body("20", "the"))
    assert answer.status_code == 503 and "died" in answer.json()["error"]["message"]
    manager.background_thread_status.fatal_error = None  # as before it is written down
    (answer,) = server.ask(body("20", "the", stream=True))
    assert answer.status_code == 503 and "ending" in answer.json()["error"]["message"]
    server.generation.shutdown()


def test_a_stop_does_not_wait_for_requests(made):  # noqa: F811
    server = Server(made[0] / "plan")
    requests = requests_of(server)

    async def go():
        long = json.dumps(body("20", "the", max_tokens=2000)).encode()
        answer, _ = client(server.app, long, seen := [])
        await until(lambda: requests.scheduler.active_requests)
        began = time.monotonic()
        await asyncio.to_thread(server.generation.shutdown)
        assert time.monotonic() - began < 5 and not requests._cb.is_running()
        answer.cancel()  # as uvicorn does with what is left
        await answer
        assert seen[0]["status"] == 503

    asyncio.run(asyncio.wait_for(go(), 30))
