"""kill -9 at random moments of compress and recover, the same command again, and what comes out.

    python bench/kill.py [KILLS]       # 20 by default, of each command; writes results/kill.json

Each command runs once unbroken, then KILLS times in a fresh folder: it is killed at a random moment
of its own stretch of the run (one kill in each of KILLS equal stretches, drawn by a seed), started
again with the same arguments, and its plan and weights are compared with the unbroken run's. The
state is written as often as it can be, so that kills hit many states. Processes are forked from
this one, which saves the time of importing; they get SIGKILL and share nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

import flexmoe.cli
import flexmoe.pipeline
import flexmoe.recover
import flexmoe.resume
from common import save
from flexmoe.files import remove_stale
from flexmoe.resume import work_folder

KILLS = 20
COMPRESS = "compress tiny -o {out} --samples 16 --seq-len 32 --batch-size 2 --learn-steps 8"
RECOVER = "recover {family} -o {out} --tokens 1024 --seq-len 32 --batch-size 4"


def start(command: list[str]) -> int:
    """Fork a process that runs ``flexmoe COMMAND``; returns its number."""
    pid = os.fork()
    if pid:
        return pid
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 1)
        flexmoe.resume.EVERY = 0.0
        sys.argv[1:] = command
        try:
            flexmoe.cli.main()
        except SystemExit as end:
            os._exit(end.code if isinstance(end.code, int) else 1)
        os._exit(1)


def kill(command: list[str], moment: float) -> bool:
    """Run it and kill it after ``moment`` seconds; whether it was still running then."""
    pid = start(command)
    time.sleep(moment)
    os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])


def finish(command: list[str]) -> float:
    """Run it to its end; returns seconds."""
    begin = time.monotonic()
    _, status = os.waitpid(start(command), 0)
    if status:
        raise SystemExit(f"flexmoe {' '.join(command)} ended with {status}")
    return time.monotonic() - begin


def digests(folder: Path) -> dict[str, str]:
    """sha256 of all tensors: weights, plan, statistics."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.glob("*.safetensors"))
    }


def state(out: Path) -> str:
    """Where a kill hit, by what lies there; ``done``: all was, but the process not at its end."""
    work = work_folder(out)
    if out.exists():
        return "written" if work.exists() else "done"
    if list(out.parent.glob(f".{out.name}.partial-*")):
        return "writing"
    if (work / "plan" / "flexmoe.json").exists():
        return "planned"
    stages = [p.stem for p in sorted(work.glob("*.json"), key=lambda p: p.stat().st_mtime)]
    stages = [stage for stage in stages if stage != "settings"]
    return stages[-1] if stages else "begun" if work.exists() else "before"


def kill_and_go_on(template: str, at: Path, kills: int, seed: int) -> dict[str, object]:
    """``kills`` trials of one command; raises SystemExit where a result differs."""
    whole = at / "whole"
    command = template.format(out=whole, family=at.parent / "compress" / "whole").split()
    seconds = finish(command)
    want, generator, found = digests(whole), random.Random(seed), []
    for n in range(kills):
        moment = seconds * (n + generator.random()) / kills
        out = at / f"broken-{n}"
        command = template.format(out=out, family=at.parent / "compress" / "whole").split()
        while not kill(command, moment):  # it was faster this time
            shutil.rmtree(out)
            moment *= 0.9
        hit = state(out)
        again = 0.0 if hit == "done" else finish(command)
        equal = digests(out) == want
        remove_stale(out)
        left = sorted(path.name for path in at.iterdir() if f"broken-{n}." in path.name)
        print(
            f"{command[0]} killed after {moment:.1f} s, {hit}: {again:.1f} s more, {equal=}",
            flush=True,
        )
        if not equal or left:
            raise SystemExit(f"killed after {moment:.2f} s ({hit}): {digests(out)}, left {left}")
        found.append({"after": round(moment, 2), "hit": hit, "again": round(again, 2)})
    return {
        "command": "flexmoe " + template.format(out="OUT", family="FAMILY"),
        "seconds": round(seconds, 2),
        "hit": dict(Counter(str(trial["hit"]) for trial in found)),
        "equal": len(found),
        "sha256": want,
        "kills": found,
    }


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else KILLS
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result: dict[str, object] = {"kills": kills, "seed": 0}
        for name, template in (("compress", COMPRESS), ("recover", RECOVER)):
            at = Path(folder) / name
            at.mkdir()
            result[name] = kill_and_go_on(template, at, kills, seed=0)
    save("kill", result)


if __name__ == "__main__":
    main()
