"""Two processes: the same plan and the same weights as one, sharded or not; clean refusals.

One pair of real processes runs all commands one after the other, each with a process group of its
own, because starting Python is what takes long here.
"""

import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from typer.testing import CliRunner

from flexmoe.cli import app
from flexmoe.data import load_tokenizer
from flexmoe.family import load, load_stock
from flexmoe.headers import resolve
from flexmoe.plan import Plan
from flexmoe.resume import work_folder

# One window at a time, so that all products have the same shapes: then only the order in which
# float32 gradients of windows are added up differs. The norm of the difference is compared with
# that of the whole change (measured: 4e-5 at most; windows that go two at a time round otherwise,
# and Adam, which divides gradients by their own size, makes 0.011 of it), and no weight may differ
# by more than one step at the highest rate.
TOLERANCE = 1e-3
RATE = 1e-3

DRIVER = """
import json, os, sys
import flexmoe.cli, flexmoe.exporter, flexmoe.progress, flexmoe.resume, torch
torch.set_num_threads(1)
rank, folder = os.environ["RANK"], sys.argv[1]
progress, write = (flexmoe.progress.bar, flexmoe.progress.silent), flexmoe.exporter.rank_checkpoint

def killer(items, description):
    for n, item in enumerate(items):
        yield item
        if description == "recover" and n == 1:
            raise KeyboardInterrupt

def full_disk(*_):
    raise OSError("disk is full")

codes = []
for line in open(f"{folder}/commands"):
    what, os.environ["MASTER_PORT"], *sys.argv[1:] = line.split()
    broken = (killer, killer) if what == "kill" else progress
    flexmoe.progress.bar, flexmoe.progress.silent = broken
    flexmoe.resume.EVERY = 0.0 if what == "kill" else 20.0
    flexmoe.exporter.rank_checkpoint = full_disk if what == "full" and rank == "0" else write
    try:
        flexmoe.cli.main()
    except SystemExit as end:
        codes.append(end.code)
    left = sys.argv[sys.argv.index("-o") + 1]
    codes[-1] = [codes[-1], os.path.exists(left), os.path.exists(left + ".work")]
    json.dump(codes, open(f"{folder}/codes-{rank}", "w"))
"""

COMPRESS = (
    "--data books.train,code.train,math.train --samples 14 --seq-len 24 --batch-size 6 "
    "--micro-batch 1 --learn-steps 2 --pruned .3,.6"
)
RECOVER = "--tokens 144 --seq-len 12 --batch-size 4 --micro-batch 1 --lr 1e-3"
FAST = "--samples 4 --seq-len 24 --batch-size 2 --allocate global --pruned .5"


def one(command):
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output


def ports(number):
    """Free ports, one for each command: a group that is gone may still hold its own."""
    held = [socket.socket() for _ in range(number)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    found = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return found


def pair(folder, commands):
    """Run the driver twice with the environment that torchrun sets; returns what was said."""
    lines = zip(commands, ports(len(commands)), strict=True)
    (folder / "commands").write_text("\n".join(c.replace(" ", f" {p} ", 1) for c, p in lines))
    group = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(folder)],
            env={**os.environ, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        return [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The folder with all results, and of each command on each process: its exit code, and
    whether its result and its work state are there."""
    at = tmp_path_factory.mktemp("parallel")
    stock = at / "stock"  # tiny in float32, so that weights can be told apart
    model = load_stock(resolve("tiny"), dtype=torch.float32)
    model.save_pretrained(stock)
    load_tokenizer(resolve("tiny"), model.config).save_pretrained(stock)
    one(f"compress {stock} -o {at}/plan-1 {COMPRESS}")
    one(f"recover {at}/plan-1 -o {at}/full-1 {RECOVER}")
    one(f"recover {at}/plan-1 -o {at}/router-1 {RECOVER} --mode router")
    commands = {
        "plan-2": f"run compress {stock} -o {at}/plan-2 {COMPRESS}",
        "plan-s": f"run compress {stock} -o {at}/plan-s {COMPRESS} --shard",
        "full-2": f"run recover {at}/plan-1 -o {at}/full-2 {RECOVER}",
        "killed": f"kill recover {at}/plan-1 -o {at}/full-s {RECOVER} --shard",
        "full-s": f"run recover {at}/plan-1 -o {at}/full-s {RECOVER} --shard",
        "router-s": f"run recover {at}/plan-1 -o {at}/router-s {RECOVER} --mode router --shard",
        "odd": f"run compress {stock} -o {at}/odd {COMPRESS} --batch-size 3",
        "odd-r": f"run recover {at}/plan-1 -o {at}/odd-r {RECOVER} --batch-size 3",
        "few": f"run compress {stock} -o {at}/few {FAST} --batch-size 4 --data math.train",
        "taylor": f"run compress {stock} -o {at}/taylor {FAST} --method taylor --shard",
        "camera": f"run compress {stock} -o {at}/camera {FAST} --method camera --shard",
        "full": f"full compress {stock} -o {at}/full {FAST}",
    }
    said = pair(at, list(commands.values()))
    codes = [json.loads((at / f"codes-{rank}").read_text()) for rank in range(2)]
    assert len(codes[0]) == len(codes[1]) == len(commands), said
    return at, {name: [of[n] for of in codes] for n, name in enumerate(commands)}, said


WROTE = [0, True, False]
REFUSED = [2, False, False]


def weights(folder):
    """All weights of a model as one vector."""
    parameters = load(folder, dtype=torch.float32).parameters()
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.mark.parametrize("name", ["plan-2", "plan-s"])
def test_the_same_plan(done, name):
    at, codes, _ = done
    assert codes[name][0] == WROTE and codes[name][1][0] == 0
    one, two = Plan.load(at / "plan-1"), Plan.load(at / name)
    assert all(torch.equal(one.order[i], two.order[i]) for i in one.order)
    assert all(torch.equal(one.width[i], two.width[i]) for i in one.width)
    assert torch.equal(weights(at / "plan-1"), weights(at / name))


@pytest.mark.parametrize("name", ["full-2", "full-s", "router-s"])
def test_the_same_weights(done, name):
    at, codes, _ = done
    assert codes[name][0] == WROTE and codes[name][1][0] == 0
    before, one, two = (
        weights(at / folder) for folder in ("plan-1", f"{name.split('-')[0]}-1", name)
    )
    assert (one - before).abs().max() > RATE
    assert (two - one).norm() < TOLERANCE * (one - before).norm()
    assert (two - one).abs().max() < RATE


def test_a_killed_sharded_run_goes_on(done):
    _, codes, said = done
    assert codes["killed"] == [[130, False, True]] * 2
    assert codes["full-s"][0] == WROTE  # whose weights are compared above
    assert "recover" not in said[1][1]  # only the first process shows its progress


@pytest.mark.parametrize("name", ["odd", "odd-r", "few", "taylor"])
def test_what_cannot_be_shared_is_refused(done, name):
    at, codes, said = done
    assert codes[name] == [REFUSED] * 2
    assert not list(at.glob(f"*{name}.*")) and not work_folder(at / name).exists()
    message = {
        "odd": "a batch of 3 windows cannot be shared by 2 processes",
        "odd-r": "a batch of 3 windows cannot be shared by 2 processes",
        "few": "1 batches of calibration text cannot be shared by 2 processes",
        "taylor": "shard does not work with method 'taylor'",
    }[name]
    assert all(message in errors for _, errors in said)


def test_a_method_that_reads_weights_works_sharded(done):
    assert done[1]["camera"][0] == WROTE


def test_all_fail_when_the_first_cannot_write(done):
    at, codes, said = done
    assert codes["full"] == [[2, False, True]] * 2
    assert all("disk is full" in errors for _, errors in said)
    assert Plan.load(at / "full.work" / "plan").width


def test_shard_needs_processes(tmp_path):
    for command in ("compress tiny", "recover tiny"):
        result = CliRunner().invoke(app, [*command.split(), "-o", f"{tmp_path}/x", "--shard"])
        assert "shard has no effect with one process" in str(result.exception)


@pytest.mark.parametrize(
    "device, gpus, message",
    [
        ("cuda", 0, "2 were started on this machine, which has 0"),
        ("cuda", 1, "2 were started on this machine, which has 1"),
        ("auto", 1, "2 were started on this machine, which has 1"),
        ("cuda:0", 2, "expected auto, cpu, or cuda"),  # for both of them
        ("cudax", 2, "expected auto, cpu, or cuda"),
    ],
)
def test_processes_without_a_gpu_of_their_own_are_refused(device, gpus, message, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    result = CliRunner().invoke(app, ["compress", "tiny", "-o", "no", "--device", device])
    assert message in str(result.exception)
