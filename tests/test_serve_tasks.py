"""Tasks over HTTP: each equals the masked model, the nearest is found, unknown text is not."""

import asyncio
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat import TOOLS
from flexmoe.data import TINY
from flexmoe.errors import FlexmoeError
from flexmoe.plan import Plan
from flexmoe.premoe import Store, compile_plan
from flexmoe.premoe.pattern import Reach
from flexmoe.premoe.signature import signatures
from flexmoe.serve.prepare import make_settings
from flexmoe.serve.transformers_chat import chat_of
from flexmoe.serve.vllm.chat import vllm_chat_of
from helpers import masked_text, random_plan
from patterns import made_pattern
from test_serve_transformers import NEW, OTHERS, Server
from zoo import tiny_model

PROMPTS = {"code": "def main(argv):", "tale": "Once upon a time there"}
STRANGE = "1 + 1 ="
CHAT = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random checkpoint, a plan for it with channels in another order, and a store whose patterns
    have the prompts' own signatures."""
    root = tmp_path_factory.mktemp("tasks")
    model = tiny_model("qwen3_moe", vocab_size=4096)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(root / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "model" / file, root / "base")
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(root / "base")
    plan = random_plan(model, root / "base")
    plan = replace(plan, recipe=plan.recipe.model_copy(update={"weights_sha256": ""}))
    (root / "store").mkdir()
    for seed, (task, prompt) in enumerate(PROMPTS.items()):
        pattern = made_pattern(task, root / "base", seed)
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        one = Reach(tokens=16, prompts=20, distance=1e-3)
        pattern = replace(
            pattern,
            signature_E=signatures(model, ids)[0],
            reach=(one,),
            spread={16: pattern.spread[16]},
        )
        pattern.save(root / "store")
        weights = pattern.recipe.weights_sha256
    replace(plan, recipe=plan.recipe.model_copy(update={"weights_sha256": weights})).save(
        root / "plan"
    )
    return root


@pytest.fixture(scope="module", params=["base", "plan"])
def server(made, request):
    server = Server(made / request.param, patterns=str(made / "store"), keep=0.5)
    yield server
    server.generation.shutdown()


@pytest.fixture(scope="module")
def expected(made):
    """Text by task (None: the full model) and prompt: greedy, of the masked model."""
    model = AutoModelForCausalLM.from_pretrained(made / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(made / "base")
    patterns = {p.task: p for p in Store(made / "store").load_all()}
    texts = {}
    for task in (None, *patterns):
        plan = compile_plan([patterns[task or "code"]], 0.5)
        for prompt in (*PROMPTS.values(), STRANGE):
            share = plan.budgets[-1] if task else 0.0
            texts[task, prompt] = masked_text(model, tokenizer, plan, share, prompt, NEW)
    assert len({tuple(texts[t, p] for p in PROMPTS.values()) for t in (None, *patterns)}) == 3
    return texts


def body(model, prompt, **more):
    return {"model": f"moe:{model}", "prompt": prompt, "max_tokens": NEW, "temperature": 0, **more}


def test_tasks_and_the_full_model_in_one_batch_equal_the_masked_model(server, expected):
    asked = [(task, prompt) for task in PROMPTS for prompt in (*PROMPTS.values(), STRANGE)]
    bodies = [body(*one) for one in asked]
    plain = [{**body("", prompt), "model": "moe"} for prompt in PROMPTS.values()]
    budgets = server.app.state.budgets.labels[1:]  # of a family they share the batch
    *texts, _ = server.text(*bodies, *plain, *[body(b, STRANGE) for b in budgets or ("code",)])
    texts = texts[: len(bodies) + len(plain)]
    assert texts == [expected[one] for one in asked] + [expected[None, p] for p in PROMPTS.values()]


def test_the_task_of_each_prompt_is_found_and_told(server, expected):
    prompts = [*PROMPTS.items(), (None, STRANGE)]
    answers = server.ask(*[body("auto", prompt) for _, prompt in prompts])
    for (task, prompt), answer in zip(prompts, answers, strict=True):
        assert answer.json()["choices"][0]["text"] == expected[task, prompt]
        assert answer.json()["model"] == "moe:auto"
        told = {n: answer.headers[f"x-flexmoe-{n}"] for n in ("task", "nearest", "budget")}
        if task:
            assert told == {"task": task, "nearest": task, "budget": task}
            assert float(answer.headers["x-flexmoe-distance"]) < 1e-3
        else:
            assert told["task"] == "none" and told["budget"] == "0"
            assert float(answer.headers["x-flexmoe-distance"]) > 1e-3
            assert float(answer.headers["x-flexmoe-reach"]) == 1e-3
    count = lambda t: server.registry.get_sample_value(  # noqa: E731
        "flexmoe_retrieved_total", {"task": t}
    )
    assert [count(t) >= 1 for t in ("code", "tale", "none")] == [True] * 3


def test_chats_and_responses_have_a_task_too(server):
    chat = [{"role": "user", "content": PROMPTS["tale"]}]
    small = {"model": "moe:auto", "max_tokens": 2}
    (answer,) = server.ask({**small, "messages": chat}, path="/v1/chat/completions")
    assert answer.status_code == 200 and answer.headers["x-flexmoe-task"] == "tale"
    parts = [{"role": "user", "content": [{"type": "text", "text": PROMPTS["tale"]}]}]
    (answer,) = server.ask({**small, "messages": parts}, path="/v1/chat/completions")
    assert answer.status_code == 200 and answer.headers["x-flexmoe-task"] == "tale"
    response = {"model": "moe:auto", "input": PROMPTS["code"], "max_output_tokens": 2}
    (answer,) = server.ask(response, path="/v1/responses")
    assert answer.status_code == 200 and answer.headers["x-flexmoe-task"] == "code"


@pytest.mark.parametrize(("seen", "text"), [(vllm_chat_of, "a\nb"), (chat_of, "a b")])
def test_the_task_is_found_for_the_text_that_the_model_answers(seen, text):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = {"messages": [{"role": "user", "content": parts}], "tools": TOOLS}
    messages, more = seen({**asked, "chat_template_kwargs": {"thinking": False}})
    assert messages == [{"role": "user", "content": text}]
    assert more == {"tools": TOOLS, "thinking": False}
    messages, _ = seen({"input": "hi", "instructions": "be brief"})
    assert [message["content"] for message in messages] == ["be brief", "hi"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": [5] * 2049}, "has 2049 tokens, and a request may have 2048"),
        ({"prompt": ""}, "the prompt is empty"),
        ({}, "no prompt was found"),
        ({"prompt": ["a"]}, "for one prompt"),
        ({"prompt": [5, 10**6]}, "token 1000000 is none of the model's 4096"),
        ({"messages": [{"content": 3}, 4]}, "do not fit the chat template"),
        ({"prompt": "a", "model": "moe:cod"}, "Did you mean 'moe:code'"),
    ],
)
def test_requests_without_a_prompt_are_refused_and_the_engine_lives(server, wrong, message):
    path = "/v1/chat/completions" if "messages" in wrong else "/v1/completions"
    (answer,) = server.ask({"model": "moe:auto", **wrong}, path=path)
    assert answer.status_code in (400, 404) and message in answer.json()["error"]["message"]
    assert server.generation.is_cb_alive()


def test_tasks_are_listed(server, made):
    import httpx2

    async def go():
        transport = httpx2.ASGITransport(app=server.app)
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            return [(await client.get(p)).json() for p in ("/v1/models", "/flexmoe/status")]

    models, status = asyncio.run(go())
    by_id = {entry["id"]: entry["flexmoe"] for entry in models["data"]}
    assert by_id["moe:auto"] == {"tasks": ["code", "tale"]}
    assert by_id["moe:code"]["task"] == "code" and by_id["moe:code"]["pruned"] == 0.5
    assert [task["id"] for task in status["tasks"]] == ["moe:code", "moe:tale"]
    assert status["tasks"][0]["bytes"] < status["budgets"][0]["bytes"]


def test_what_cannot_be_served_is_refused(made, tmp_path):
    store = {"patterns": str(made / "store"), "keep": 0.5}

    def wrong(path, why, **changes):
        with pytest.raises(FlexmoeError, match=why):
            make_settings(str(path), name="moe", **OTHERS | store | changes)

    wrong(made / "base", "go together", keep=None)
    wrong(made / "base", "go together", patterns=None)
    wrong(made / "base", "no patterns in", patterns=str(tmp_path))
    wrong(made / "base", "above 0 and be at most 1", keep=50.0)
    wrong(made / "plan", "with budget 0 among", budgets="20,40")
    wrong("tiny", "is a store of another model")
    plan = Plan.load(made / "plan")
    recovered = plan.recipe.model_copy(update={"recovery": [{"mode": "family"}]})
    replace(plan, recipe=recovered).save(tmp_path / "recovered")
    wrong(tmp_path / "recovered", "has recovered weights")
