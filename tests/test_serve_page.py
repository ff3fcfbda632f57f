"""The page in headless Chromium, against the echo behind the middleware on a real port."""

import re
import shutil
import subprocess
import threading
import time
from importlib.resources import files

import pytest
import uvicorn

from flexmoe.premoe import Match
from flexmoe.serve.engine import ServedTask
from serving import Serving, settings

CHROMIUM = shutil.which("chromium")
QUIET = ("gpu", "quic", "background-networking", "component-update", "sync")
# What a visitor does: turn the dial to 40, then ask two budgets.
VISIT = """<script>
const until = (seen, then) => seen() ? then() : setTimeout(until, 20, seen, then);
document.getElementById("key").value = "KEY";
until(() => document.querySelectorAll(".budget").length === 4, () => {
  document.querySelectorAll(".budget")[2].click();
  until(() => document.querySelector(".budget[aria-checked=true] .share").textContent === "40 %",
    () => document.getElementById("ask").click());
});
</script>"""
# Turn nothing: ask the task that is found, and what stands first, the full model.
ASK = """<script>
const until = (seen, then) => seen() ? then() : setTimeout(until, 20, seen, then);
until(() => document.getElementById("right").options.length, () => {
  document.getElementById("prompt").value = "PROMPT";
  document.getElementById("left").value = "moe:code";
  document.getElementById("ask").click();
});
</script>"""
TASKS = tuple(
    ServedTask(task=task, pruned=0.5, routed_parameters=500, bytes=1500)
    for task in ("code", "<b>tale")
)
PAGE = files("flexmoe.serve").joinpath("page.html").read_text()


def test_the_page_loads_nothing_from_elsewhere():
    addresses = set(re.findall(r"https?://[^\"'\s)]+", PAGE))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "innerHTML" not in PAGE  # answers of a model are text


@pytest.fixture
def chromium(tmp_path):
    """Serves an application and the page with a script added to it; what a visitor sees then."""
    if CHROMIUM is None:
        pytest.skip("no chromium")
    started = []

    def go(serving, script):
        async def app(scope, receive, send):
            if scope["type"] != "http" or scope["path"] != "/visit":
                await serving.app(scope, receive, send)
                return
            page = PAGE.replace("</html>", script + "</html>")
            kind = [(b"content-type", b"text/html")]
            await send({"type": "http.response.start", "status": 200, "headers": kind})
            await send({"type": "http.response.body", "body": page.encode()})

        server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=server.run)
        started.append((server, thread))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        command = [CHROMIUM, "--headless", "--no-sandbox", *(f"--disable-{what}" for what in QUIET)]
        command += ["--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=4000", "--dump-dom"]
        address = f"http://127.0.0.1:{port}/visit"
        run = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
        return run.stdout.split("<script>")[0]

    yield go
    for server, thread in started:
        server.should_exit = True
        thread.join()


@pytest.fixture
def visit(chromium):
    """What a visitor sees after `VISIT` with a key; the server behind it."""
    measured = [
        m.model_copy(update={"nll": 2 + m.pruned, "kept": 1 - m.pruned / 2})
        for m in settings().members
    ]
    serving = Serving(api_key="secret", members=tuple(measured))
    return lambda key: (chromium(serving, VISIT.replace("KEY", key)), serving)


def test_a_visit(visit):
    page, serving = visit("secret")
    assert serving.state.dial.budget == "40" and serving.state.dial.switches == 1
    assert re.search(r'aria-checked="true">.{0,80}40 %</span><span class="tag">default', page)
    assert "80.0 %" in page and "2.400" in page  # kept and loss of 40
    assert "0 → 40 % by request" in page
    assert ">moe:0</h3>" in page and ">moe:60</h3>" in page
    assert page.count("<pre id=") == 2 and page.count("one two three</pre>") == 2
    assert {body["budget"] for body in serving.echo.bodies} == {"0", "60"}


def test_a_visit_with_a_wrong_key(visit):
    page, serving = visit("wrong")
    assert "needs the header 'Authorization: Bearer API-KEY'" in page
    assert serving.state.dial.budget == "0" and serving.echo.bodies == []


@pytest.mark.parametrize("task", ["<b>tale", None])
def test_a_visit_where_tasks_are_served(chromium, task):
    """They are listed beside the budgets, and the one that is found is told with its distance."""
    serving = Serving(tasks=TASKS, members=settings().members[:1])

    async def retrieve(body):
        assert body["prompt"] == "once"
        return Match(task, "<b>tale", 0.25, 0.5 if task else 0.125, {})

    serving.engine.retrieve = retrieve
    page = chromium(serving, ASK.replace("PROMPT", "once"))
    assert re.search(r'<section id="of-tasks">', page)  # not hidden
    cards = re.findall(r'<div class="task" role="listitem">.*?</dl></div>', page)
    assert len(cards) == 2 and "code</span>" in cards[0] and "&lt;b&gt;tale</span>" in cards[1]
    assert all("1.5 kB" in card and "50.0 %" in card for card in cards)
    options = re.findall(r'<option value="([^"]+)">([^<]+)</option>', page)
    assert (
        options[:4]
        == options[4:8]
        == [
            ("moe", "0 %"),
            ("moe:code", "task code"),
            ("moe:&lt;b&gt;tale", "task &lt;b&gt;tale"),
            ("moe:auto", "the task that is found"),
        ]
    )
    assert ">moe:code</h3>" in page and ">moe:auto</h3>" in page
    assert 'id="left-found"></p>' in page  # nothing was looked for
    told = re.search(r'id="right-found">([^<]*)</p>', page)[1]
    if task:
        assert told == "task &lt;b&gt;tale, 0.25 away; its text lies within 0.5"
    else:
        assert told.startswith("full model: no task is near. The nearest is &lt;b&gt;tale, 0.25")
    assert page.count("one two three</pre>") == 2
    assert {body["budget"] for body in serving.echo.bodies} == {"code", task or "0"}


def test_without_tasks_the_page_has_none(visit):
    page, _ = visit("secret")
    assert 'id="of-tasks" hidden' in page and "moe:auto" not in page.split("about-tasks")[0]
