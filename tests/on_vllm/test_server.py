"""``flexmoe serve --engine vllm``: ids, budgets, prefix cache, the dial, and what goes wrong."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

import httpx2
from served import BUDGETS, NEW_TOKENS, PROMPTS, make, prompts, tokenizer

from chat import MESSAGES, TOOLS
from flexmoe.serve.ids import label

NAME = "qwen3_moe"
LABELS = [label(share) for share in BUDGETS]
OPTIONS = ("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "16")


class Server:
    """``flexmoe serve`` in a process of its own, on a free port of the loopback."""

    def __init__(self, family: Path, log: Path, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", log
        command = [sys.executable, "-m", "flexmoe", "serve", str(family), "--engine", "vllm"]
        command += ["--name", "moe", "--port", str(port), "--dtype", "float32", *options]
        self.process = subprocess.Popen(
            [*command, "--", *OPTIONS],
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"},
        )

    def up(self) -> Server:
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx2.get(f"{self.url}/health").status_code == 200:
                    return self
            except httpx2.TransportError:
                time.sleep(0.5)
        self.process.kill()
        raise AssertionError(f"not up, exit code {self.process.poll()}: {self.said()[-4000:]}")

    def said(self) -> str:
        return self.log.read_text()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    make(NAME, root)
    return root / NAME


@pytest.fixture(scope="module")
def tokens(folder: Path) -> dict[str, list[list[int]]]:
    return json.loads((folder / "tokens.json").read_text())


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    running = Server(folder / "family", folder / "log", "--api-key", "secret", "--default", "20")
    yield running.up()
    running.stop()


@pytest.fixture
def client(server: Server) -> Iterator[httpx2.Client]:
    key = {"Authorization": "Bearer secret"}
    with httpx2.Client(base_url=server.url, headers=key, timeout=120) as client:
        yield client


def body(model: str, ids: list[int], **more: Any) -> dict[str, Any]:
    fixed = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    return {"model": model, "prompt": ids, "return_token_ids": True, **fixed, **more}


def answer(client: httpx2.Client, model: str, ids: list[int], **more: Any) -> list[int]:
    found = client.post("/v1/completions", json=body(model, ids, **more)).raise_for_status().json()
    assert found["model"] == model
    return found["choices"][0]["token_ids"]


def test_every_budget_is_a_model_id(client: httpx2.Client) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == ["moe", *(f"moe:{b}" for b in LABELS)]
    assert {entry["parent"] for entry in listed[1:]} == {"moe"}


def test_requests_of_all_budgets_at_once_get_the_tokens_of_theirs(server, tokens) -> None:
    asked = [(budget, n) for n in range(PROMPTS) for budget in LABELS]

    async def run() -> list[list[int]]:
        key = {"Authorization": "Bearer secret"}
        async with httpx2.AsyncClient(base_url=server.url, headers=key, timeout=300) as client:
            posts = [
                client.post("/v1/completions", json=body(f"moe:{budget}", prompts()[n]))
                for budget, n in asked
            ]
            return [
                found.raise_for_status().json()["choices"][0]["token_ids"]
                for found in await asyncio.gather(*posts)
            ]

    found = asyncio.run(run())
    wrong = Counter(b for (b, n), got in zip(asked, found, strict=True) if got != tokens[b][n])
    assert not wrong


def test_the_prefix_cache_never_mixes_budgets(client: httpx2.Client) -> None:
    """A long prompt, over several blocks of the cache; and a client that tries to get round it."""
    long = [3 + 7 * n % 500 for n in range(180)]
    fresh = {b: answer(client, f"moe:{b}", long, cache_salt=f"alone-{b}") for b in LABELS}
    assert len({json.dumps(found) for found in fresh.values()}) == len(LABELS)
    for _ in range(2):  # the second time from the cache
        for budget in LABELS:
            sneaky = {"cache_salt": "same", "vllm_xargs": {"flexmoe_budget": "0"}}
            assert answer(client, f"moe:{budget}", long) == fresh[budget]
            assert answer(client, f"moe:{budget}", long, **sneaky) == fresh[budget]
    hits = [x for x in client.get("/metrics").text.splitlines() if "prefix_cache_hits_total{" in x]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in hits) > 0


def test_the_dial_turns_the_default_and_nothing_else(client: httpx2.Client, tokens) -> None:
    ids = prompts()[0]
    assert answer(client, "moe", ids) == tokens["20"][0]
    moved = client.post("/flexmoe/budget", json={"budget": "60", "strict": True})
    assert moved.raise_for_status().json()["budget"] == "60"
    assert answer(client, "moe", ids) == tokens["60"][0]
    assert answer(client, "moe:40", ids) == tokens["40"][0]
    chat = {"messages": [{"role": "user", "content": "t5 t6 t7"}], "max_tokens": 3}
    said = client.post("/v1/chat/completions", json={"model": "moe", **chat}).raise_for_status()
    assert said.headers["x-flexmoe-budget"] == "60"
    client.post("/flexmoe/budget", json={"budget": "20"}).raise_for_status()
    counted = client.get("/metrics").text
    assert 'flexmoe_switches_total{by="request",from="20",to="60"}' in counted
    assert "vllm:" in counted


def said(answer: httpx2.Response) -> list[int]:
    """Tokens of an answer to a chat, whole or in the events of a stream."""
    assert answer.status_code == 200, answer.text
    if "event-stream" not in answer.headers["content-type"]:
        return answer.json()["choices"][0]["token_ids"]
    lines = [line[6:] for line in answer.text.split("\n\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return [token for choice in choices for token in choice.get("token_ids") or []]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_a_chat_at_every_budget_is_the_completion_of_its_prompt(client, stream, tools) -> None:
    prompt = tokenizer().apply_chat_template(MESSAGES, tools=tools, add_generation_prompt=True)
    wanted = {b: answer(client, f"moe:{b}", prompt["input_ids"]) for b in LABELS}
    assert len({json.dumps(tokens) for tokens in wanted.values()}) == len(LABELS)
    for budget in LABELS:
        asked = body(f"moe:{budget}", [], messages=MESSAGES, tools=tools, stream=stream)
        del asked["prompt"]
        if tools:
            asked["tool_choice"] = "none"
        found = client.post("/v1/chat/completions", json=asked)
        assert found.headers["x-flexmoe-budget"] == budget and f'"moe:{budget}"' in found.text
        assert said(found) == wanted[budget]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"messages": [MESSAGES[1], MESSAGES[1]]}, "roles must alternate"),
        ({"messages": "hi"}, "messages"),
        ({}, "messages"),
        ({"messages": MESSAGES, "tools": TOOLS, "tool_choice": "auto"}, "tool-call-parser"),
        ({"messages": MESSAGES, "tools": {"a": 1}}, "tools"),
    ],
)
def test_what_is_wrong_with_a_chat_is_said(client, wrong, words) -> None:
    found = client.post("/v1/chat/completions", json={"model": "moe:40", "max_tokens": 3, **wrong})
    assert found.status_code == 400 and words in found.json()["error"]["message"], found.text


def test_what_clients_get_wrong_is_said_and_the_server_stays_up(client: httpx2.Client) -> None:
    ids = prompts()[0]
    unknown = client.post("/v1/completions", json=body("moe:30", ids))
    assert unknown.status_code == 404 and "moe:40" in unknown.json()["error"]["message"]
    for bad in (b"{", b"[1]", json.dumps(body("moe", ids, vllm_xargs=3)).encode()):
        assert client.post("/v1/completions", content=bad).status_code == 400
    assert client.post("/flexmoe/budget", json={"budget": "99"}).status_code == 404
    assert client.post("/flexmoe/budget", json={"budget": 40}).status_code == 422
    no_key = httpx2.post(f"{client.base_url}/v1/completions", json=body("moe", ids))
    assert no_key.status_code == 401
    page = client.get("/flexmoe/ui")
    assert page.status_code == 200 and "<html" in page.text
    assert len(answer(client, "moe:0", ids)) == NEW_TOKENS


def test_a_killed_worker_is_said_and_the_server_ends(folder: Path, tmp_path: Path) -> None:
    running = Server(folder / "family", tmp_path / "log").up()
    worker = next(pid for pid in descendants(running.process.pid) if "Worker" in title(pid))

    async def run() -> Counter[str]:
        seen: Counter[str] = Counter()
        async with httpx2.AsyncClient(base_url=running.url, timeout=60) as client:

            async def one() -> None:
                while True:
                    try:
                        found = await client.post("/v1/completions", json=body("moe:20", [5, 6, 7]))
                    except httpx2.TransportError:
                        seen["gone"] += 1
                        return
                    seen[str(found.status_code)] += 1
                    if found.status_code == 500:
                        assert found.json()["error"]["message"]

            clients = [asyncio.create_task(one()) for _ in range(8)]
            await asyncio.sleep(1.5)
            os.kill(worker, signal.SIGKILL)
            await asyncio.wait_for(asyncio.gather(*clients), 60)
        return seen

    seen = asyncio.run(run())
    assert seen["200"] and seen["500"] and set(seen) <= {"200", "500", "gone"}
    assert running.process.wait(60) in (0, 1)  # by itself, not by a signal
    again = Server(folder / "family", tmp_path / "again").up()
    found = httpx2.post(f"{again.url}/v1/completions", json=body("moe:20", [5, 6, 7]), timeout=60)
    assert found.status_code == 200
    again.stop()


def descendants(pid: int) -> list[int]:
    import psutil

    return [child.pid for child in psutil.Process(pid).children(recursive=True)]


def title(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()
