"""Committed results and the tables made of them belong together; answers are counted in tokens."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import httpx2
import pytest

BENCH = Path(__file__).parent.parent / "bench"


def test_tables_are_what_the_results_say():
    command = [sys.executable, str(BENCH / "tables.py"), "--check"]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(("usage", "tokens"), [({"completion_tokens": 5}, 5), (None, 2)])
def test_streamed_tokens_are_those_that_the_server_counts(usage, tokens, monkeypatch):
    monkeypatch.syspath_prepend(BENCH)
    from serve import complete

    def answer(request):
        assert json.loads(request.content)["stream_options"] == {"include_usage": True}
        events = [{"choices": [{"text": text}]} for text in ("a b c", "d", "")]
        events.append({"choices": [], "usage": usage})
        text = "".join(f"data: {json.dumps(event)}\n\n" for event in events)
        return httpx2.Response(200, headers={"x-flexmoe-budget": "40"}, text=text)

    async def ask():
        transport = httpx2.MockTransport(answer)
        async with httpx2.AsyncClient(base_url="http://local", transport=transport) as client:
            return await complete(client, "moe:40", "once", True)

    assert asyncio.run(ask()) == ("40", "a b cd", tokens)
