"""--engine transformers: every budget over HTTP equals the masked model, mixed in one batch too."""

import asyncio
import shutil

import httpx2
import pytest
import torch
from prometheus_client import CollectorRegistry
from transformers import AutoModelForCausalLM, AutoTokenizer

import flexmoe
from flexmoe import elastic
from flexmoe.data import TINY
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.serve import transformers_batch as batching
from flexmoe.serve.prepare import make_settings
from flexmoe.serve.transformers_engine import assemble
from helpers import expert_bytes, masked_text, random_plan
from serving import ask_at_once
from test_router_rules import expert_plan
from zoo import tiny_model

PROMPTS = ["def main(argv):", "Once upon a time there", "1 + 1 =", "the"]
BUDGETS = ("0", "20", "40", "60")
NEW = 12
OTHERS = {
    "host": "127.0.0.1",
    "port": 18399,
    "api_key": None,
    "kv_tokens": 2048,
    "base": None,
    "device": "cpu",
    "dtype": "float32",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A random checkpoint with the shipped tokenizer, and a plan for it."""
    root = tmp_path_factory.mktemp("serve")
    model = tiny_model("qwen3_moe", vocab_size=4096)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(root / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "model" / file, root / "base")
    plan = random_plan(model, root / "base")
    plan.save(root / "plan")
    return root, plan


class Server:
    """The application in this process; `ask` sends requests at once and gives their answers."""

    def __init__(self, path, **changes):
        settings = make_settings(str(path), name="moe", **OTHERS | changes)
        self.registry = CollectorRegistry()
        self.app, self.generation, self.room = assemble(settings, self.registry)

    def ask(self, *bodies, path="/v1/completions"):
        return ask_at_once(self.app, path, bodies)

    def text(self, *bodies):
        found = []
        for answer in self.ask(*bodies):
            assert answer.status_code == 200, answer.text
            found.append(answer.json()["choices"][0]["text"])
        return found


@pytest.fixture(scope="module")
def server(made):
    server = Server(made[0] / "plan")
    yield server
    server.generation.shutdown()


@pytest.fixture(scope="module")
def expected(made):
    """Text by budget and prompt: greedy, one by one, of the masked model."""
    root, plan = made
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    texts = {}
    for budget in BUDGETS:
        for prompt in PROMPTS:
            share = int(budget) / 100
            texts[budget, prompt] = masked_text(model, tokenizer, plan, share, prompt, NEW)
    # budgets can be told apart
    assert len({tuple(texts[b, p] for p in PROMPTS) for b in BUDGETS}) == len(BUDGETS)
    return texts


def body(budget, prompt, **more):
    return {"model": f"moe:{budget}", "prompt": prompt, "max_tokens": NEW, **more}


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_equals_the_masked_model(server, expected, budget):
    for prompt in PROMPTS:
        assert server.text(body(budget, prompt, temperature=0)) == [expected[budget, prompt]]


def test_a_batch_of_all_budgets_equals_each_alone(server, expected):
    """With one that samples among them: it must not disturb the others."""
    asked = [(b, p) for p in PROMPTS for b in BUDGETS]
    hot = body("40", "the", temperature=2, top_p=0.9)
    steps = []
    see = batching._Batch.see
    try:
        batching._Batch.see = lambda self, requests: (
            see(self, requests),
            steps.append({r.state.logit_processor_kwargs["flexmoe"].budget for r in requests}),
        )[0]
        *texts, _ = server.text(*[body(*one) for one in asked], hot)
    finally:
        batching._Batch.see = see
    assert texts == [expected[one] for one in asked]
    assert any(len(step) == len(BUDGETS) for step in steps)  # they did share batches


def test_streams_equal_whole_answers(server, expected):
    import json

    answers = server.ask(*[body(b, PROMPTS[0], stream=True) for b in BUDGETS])
    for budget, answer in zip(BUDGETS, answers, strict=True):
        assert answer.headers["x-flexmoe-budget"] == budget
        *lines, last = answer.text.strip().split("\n\n")
        assert last == "data: [DONE]"  # as OpenAI's end, which transformers' do not
        events = [json.loads(line[6:]) for line in lines]
        assert {event["model"] for event in events} == {f"moe:{budget}"}
        text = "".join(event["choices"][0]["text"] for event in events)
        assert text == expected[budget, PROMPTS[0]]


def test_a_request_id_of_the_client_is_not_used(server, expected):
    async def go():
        transport = httpx2.ASGITransport(app=server.app)
        headers = {"x-request-id": "same"}
        async with httpx2.AsyncClient(transport=transport, base_url="http://x") as client:
            asked = [
                client.post("/v1/completions", json=body(b, PROMPTS[0]), headers=headers)
                for b in BUDGETS
            ]
            return await asyncio.wait_for(asyncio.gather(*asked), 60)

    texts = [answer.json()["choices"][0]["text"] for answer in asyncio.run(go())]
    assert texts == [expected[b, PROMPTS[0]] for b in BUDGETS]


def test_memory_goes_and_comes_back_over_http(made, expected):
    server = Server(made[0] / "plan")
    model = server.app.state.engine.memory.model
    whole = expert_bytes(model)

    def dial(**wish):
        (answer,) = server.ask(wish, path="/flexmoe/budget")
        assert answer.status_code == 200, answer.text
        return answer.json()

    wanted = {b: [expected[b, prompt] for prompt in PROMPTS] for b in BUDGETS}
    ask = lambda b: server.text(*[body(b, prompt) for prompt in PROMPTS])  # noqa: E731
    freed = dial(budget="40", release=True)["freed_bytes"]
    parameters = [made[1].member(share).routed_parameters for share in (0.0, 0.4)]
    assert freed == whole - expert_bytes(model) == 4 * (parameters[0] - parameters[1]) > 0
    assert (ask("40"), ask("60")) == (wanted["40"], wanted["60"])
    (refused,) = server.ask(body("20", PROMPTS[0]))
    assert refused.status_code == 503 and "not in memory" in refused.json()["error"]["message"]
    assert dial(budget="0")["released_bytes"] == 0 and expert_bytes(model) == whole
    assert {b: ask(b) for b in BUDGETS} == wanted
    server.generation.shutdown()


def test_what_was_read_of_weights_that_do_not_fit_goes_again(made, expected, monkeypatch):
    server, read = Server(made[0] / "plan"), elastic._read
    model = server.app.state.engine.memory.model
    wish = {"budget": "40", "release": True}
    server.ask(wish, path="/flexmoe/budget")
    small, last = expert_bytes(model), max(layer.index for layer in expert_layers(model))

    def out_of_memory(layer, *others):
        if layer.index == last:
            raise RuntimeError("out of memory")
        return read(layer, *others)

    monkeypatch.setattr(elastic, "_read", out_of_memory)
    (answer,) = server.ask({"budget": "20"}, path="/flexmoe/budget")
    assert answer.status_code == 503 and "out of memory" in answer.json()["error"]["message"]
    assert expert_bytes(model) == small
    assert server.text(body("40", PROMPTS[0])) == [expected["40", PROMPTS[0]]]
    server.generation.shutdown()


def test_a_release_without_memory_for_what_stays_keeps_the_poorer_budgets(
    made, expected, monkeypatch
):
    server, kept = Server(made[0] / "plan"), elastic._kept
    model = server.app.state.engine.memory.model
    whole, last = expert_bytes(model), expert_layers(model)[-1].module

    def out_of_memory(module, width_E):
        if module is last:
            raise RuntimeError("out of memory")
        return kept(module, width_E)

    monkeypatch.setattr(elastic, "_kept", out_of_memory)
    (answer,) = server.ask({"budget": "40", "release": True}, path="/flexmoe/budget")
    assert answer.status_code == 200
    assert answer.json()["freed_bytes"] == whole - expert_bytes(model) > 0
    (refused,) = server.ask(body("20", PROMPTS[0]))
    assert refused.status_code == 503
    assert server.text(body("40", PROMPTS[0])) == [expected["40", PROMPTS[0]]]
    server.ask({"budget": "0"}, path="/flexmoe/budget")
    assert expert_bytes(model) == whole
    assert server.text(body("20", PROMPTS[0])) == [expected["20", PROMPTS[0]]]
    server.generation.shutdown()


def test_no_more_than_the_richest_budget_served_is_in_memory(made, expected):
    for budgets in ("20,60", "20"):
        server = Server(made[0] / "plan", budgets=budgets)
        model = server.app.state.engine.memory.model
        assert expert_bytes(model) == 4 * made[1].member(0.2).routed_parameters
        assert server.text(body("20", PROMPTS[1])) == [expected["20", PROMPTS[1]]]
        (refused,) = server.ask(body("0", PROMPTS[0]))
        assert refused.status_code == 404
        server.generation.shutdown()


def test_evicted_requests_keep_their_budget(made, expected):
    """A cache with room for two: the others are set back and begin again."""
    server = Server(made[0] / "plan", kv_tokens=64)
    try:
        asked = [(b, p) for p in PROMPTS for b in BUDGETS]
        assert server.text(*[body(*one) for one in asked]) == [expected[one] for one in asked]
    finally:
        server.generation.shutdown()


def test_an_export_and_a_plain_checkpoint_are_one_member(made, expected):
    root, _ = made
    flexmoe.export(root / "plan", root / "ragged", pruned=0.4, layout="ragged", base=root / "base")
    for path, ids, budget in (
        (root / "ragged", ["moe", "moe:40"], "40"),
        (root / "base", ["moe"], "0"),
    ):
        server = Server(path)
        try:
            assert list(server.app.state.budgets.ids) == ids
            plain = {"prompt": PROMPTS[0], "max_tokens": NEW}
            assert server.text(plain) == [expected[budget, PROMPTS[0]]]
        finally:
            server.generation.shutdown()


def test_an_export_with_constants_is_served(made):
    """The same text as the plan's own, evaluated before anything was written."""
    root, _ = made
    model = AutoModelForCausalLM.from_pretrained(root / "base", dtype=torch.float32).eval()
    torch.manual_seed(0)
    constant = {x.index: torch.randn(x.E, x.H) for x in expert_layers(model)}
    expert_plan(model, root / "base", router="constant", constant=constant).save(root / "mone")
    out = root / "constants"
    flexmoe.export(root / "mone", out, pruned=0.5, layout="ragged", base=root / "base")
    opened = flexmoe.load(root / "mone", 0.5, base=root / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(root / "base")
    ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, opened(input_ids=ids).logits[0, -1].argmax()[None, None]], 1)
    server = Server(out)
    try:
        text = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
        assert server.text({"prompt": PROMPTS[0], "max_tokens": NEW, "temperature": 0}) == [text]
    finally:
        server.generation.shutdown()


BAD = [
    ({"prompt": ""}, "the prompt is empty"),
    ({"prompt": "a", "max_tokens": 0}, "max_tokens must be a whole number from 1 on, found 0"),
    ({"prompt": "a", "max_tokens": "many"}, "found 'many'"),
    ({"prompt": "a", "max_tokens": 5000}, "do not fit into the KV cache of 2048 tokens"),
    ({"prompt": "a", "max_tokens": 5000, "stream": True}, "do not fit into the KV cache"),
    ({"prompt": "word " * 3000, "max_tokens": 1}, "do not fit into the KV cache"),
    ({"prompt": ["a"]}, "prompt must be a string"),
    ({}, "prompt"),
    ({"prompt": "a", "temperature": -1}, "temperature must be a number from 0 to 2, found -1"),
    ({"prompt": "a", "temperature": True}, "temperature must be a number"),
    ({"prompt": "a", "top_p": 1.5}, "top_p must be a number from 0 to 1"),
    ({"prompt": "a", "stop": ["x"]}, "stop is not supported"),
    ({"prompt": "a", "generation_config": "{}"}, "generation_config is not supported"),
    ({"prompt": "a", "unknown": 1}, "Unexpected fields"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "has no chat template"),
]


@pytest.mark.parametrize(("wrong", "message"), BAD)
def test_bad_input_is_refused_and_the_engine_lives(server, wrong, message):
    path = "/v1/chat/completions" if "messages" in wrong else "/v1/completions"
    (answer,) = server.ask(wrong, path=path)
    assert answer.status_code in (400, 422) and message in answer.json()["error"]["message"]
    assert server.generation.is_cb_alive()


@pytest.mark.parametrize("odd", [{"temperature": 1e-30}, {"temperature": 2, "top_p": 0}, {"n": 1}])
def test_odd_but_lawful_wishes_are_answered(server, odd):
    (answer,) = server.ask(body("20", "the", **odd))
    assert answer.status_code == 200 and server.generation.is_cb_alive()


def test_routes_that_load_and_drop_models_are_gone(server):
    for path in ("/load_model", "/reset", "/v1/systemone", "/v1/audio/transcriptions"):
        (answer,) = server.ask({}, path=path)
        assert answer.status_code == 404 and answer.json()["error"]["type"] == "NotFoundError"


def test_drawing():
    torch.manual_seed(0)
    scores = torch.tensor([[2.0, 1.0, 0.0, -9.0]]).expand(4000, 4)
    ones, every = torch.ones(4000), torch.zeros(4000, dtype=torch.int64)
    share = torch.bincount(batching.draw(scores, ones, ones, every), minlength=4) / 4000
    assert torch.allclose(share, scores[0].softmax(-1), atol=0.03)
    # 0.665 + 0.245 reach 0.7
    assert set(batching.draw(scores, ones, 0.7 * ones, every).tolist()) == {0, 1}
    assert set(batching.draw(scores, ones, 0 * ones, every).tolist()) == {0}
    assert set(batching.draw(scores, 0.01 * ones, ones, every).tolist()) == {0}
    assert set(batching.draw(scores, ones, ones, every + 3).tolist()) == {0, 1, 2}
    # of two, the first has 0.73
    assert set(batching.draw(scores, ones, 0.7 * ones, every + 2).tolist()) == {0}


def test_another_transformers_is_refused_at_the_start(monkeypatch):
    from transformers.generation.continuous_batching.model_runner import ModelRunner

    monkeypatch.setattr(ModelRunner, "_sample", lambda self: None)
    with pytest.raises(FlexmoeError, match="pip install 'transformers=="):
        batching.check()
