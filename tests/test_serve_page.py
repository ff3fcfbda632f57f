"""The page in headless Chromium, against the echo behind the middleware on a real port."""

import re
import shutil
import subprocess
import threading
import time
from importlib.resources import files

import pytest
import uvicorn

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
PAGE = files("flexmoe.serve").joinpath("page.html").read_text()


def test_the_page_loads_nothing_from_elsewhere():
    addresses = set(re.findall(r"https?://[^\"'\s)]+", PAGE))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name, not an address
    assert "innerHTML" not in PAGE  # answers of a model are text


@pytest.fixture
def visit(tmp_path):
    """What a visitor sees after `VISIT` with a key; the server behind it."""
    if CHROMIUM is None:
        pytest.skip("no chromium")
    measured = [
        m.model_copy(update={"nll": 2 + m.pruned, "kept": 1 - m.pruned / 2})
        for m in settings().members
    ]
    serving = Serving(api_key="secret", members=tuple(measured))

    async def app(scope, receive, send):
        if scope["type"] != "http" or not scope["path"].startswith("/visit/"):
            await serving.app(scope, receive, send)
            return
        page = PAGE.replace("</html>", VISIT.replace("KEY", scope["path"][7:]) + "</html>")
        kind = [(b"content-type", b"text/html")]
        await send({"type": "http.response.start", "status": 200, "headers": kind})
        await send({"type": "http.response.body", "body": page.encode()})

    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]

    def go(key):
        command = [CHROMIUM, "--headless", "--no-sandbox", *(f"--disable-{what}" for what in QUIET)]
        command += ["--no-first-run", f"--user-data-dir={tmp_path / 'profile'}"]
        command += ["--virtual-time-budget=4000", "--dump-dom"]
        address = f"http://127.0.0.1:{port}/visit/{key}"
        run = subprocess.run([*command, address], capture_output=True, text=True, timeout=120)
        return run.stdout.split("<script>")[0], serving

    yield go
    server.should_exit = True
    thread.join()


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
