"""PreMoe on the command line: profile, list, specialise, and what can be wrong with them."""

from __future__ import annotations

import json
import sys

import pytest
from typer.testing import CliRunner

from flexmoe.cli import app, main
from flexmoe.headers import resolve


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Two tasks of the shipped model, made on the command line."""
    folder = tmp_path_factory.mktemp("premoe") / "store"
    for task in ("books", "math"):
        command = f"profile tiny --task {task} --data {task}.train --store {folder}"
        run = CliRunner().invoke(app, [*command.split(), "--samples", "8", "--seq-len", "32"])
        assert run.exit_code == 0, run.output
        assert f"specialise tiny --tasks {task}" in run.output.replace("\n", " ")
    return folder


def test_profile_list_and_specialise_on_the_command_line(store, tmp_path):
    listed = CliRunner().invoke(app, ["patterns", str(store)]).output
    assert all(word in listed for word in ("books.train", "math.train", "peu", "256", "tiny"))
    out = tmp_path / "both"
    command = f"specialise tiny --tasks books,math --keep 0.75 -o {out} --store {store}"
    run = CliRunner().invoke(app, command.split())
    assert run.exit_code == 0, run.output
    assert "25.00%" in run.output and "were read" in run.output and "held beyond" in run.output
    widths = json.loads((out / "config.json").read_text())["quantization_config"]["widths"]
    assert all(sorted(row) == [0] * 4 + [64] * 12 for row in widths.values())
    row = CliRunner().invoke(app, f"eval {out} --data math.valid --samples 2 --seq-len 64".split())
    assert row.exit_code == 0, row.output
    assert "| profile |" in (out / "README.md").read_text()
    again = CliRunner().invoke(app, ["reproduce", str(out)])
    assert "specialists are not made again" in str(again.exception)


PROFILE = "profile tiny --data math.train --samples 2 --seq-len 32 --store STORE"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("specialise tiny --tasks boks --keep 0.5 -o out --store STORE", "Did you mean 'books'"),
        ("specialise tiny --tasks books,books --keep 0.5 -o out --store STORE", "each named once"),
        ("specialise tiny --tasks , --keep 0.5 -o out --store STORE", "each named once"),
        ("specialise tiny --tasks books --keep 50 -o out --store STORE", "at most 1, found 50"),
        ("specialise tiny --tasks books --keep 0.1 -o out --store STORE", "keep at least 0.25"),
        ("specialise tiny --tasks books --keep 0.5 -o STORE --store STORE", "exists already"),
        ("specialise tiny --tasks books --keep 0.5 -o out", "no patterns in 'patterns'"),
        ("specialise ./none --tasks books --keep 0.5 -o out --store STORE", "no folder './none'"),
        ("patterns nowhere", "no patterns in 'nowhere'"),
        ("patterns file", "'file' is a file"),
        (f"patterns {resolve('tiny')}", "is a model or a plan: no store of patterns"),
        (f"{PROFILE} --task books", "has a pattern of 'books' already"),
        (f"{PROFILE} --task a/b", "cannot be the name of a task"),
        (f"{PROFILE} --task auto", "servers call so what they find"),
        (f"{PROFILE} --task 40", "and their budgets"),
        (f"{PROFILE} --task new --method pue", "Did you mean 'peu'"),
        (f"{PROFILE} --task new --method fisher", "scores channels, not whole experts"),
        (f"{PROFILE} --task new --method aimer", "does not look at text"),
        (f"{PROFILE} --task new --samples 0", "at least 1"),
        (f"{PROFILE} --task new --data missing.txt", "does not exist"),
        (f"{PROFILE} --task new --memory lots", "--memory"),
        ("profile tiny --data books.train --task new --store file/sub", "give another folder"),
    ],
)
def test_a_mistake_is_one_message_and_nothing_is_left(
    command, message, store, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    words = [str(store) if word == "STORE" else word for word in command.split()]
    monkeypatch.setattr(sys, "argv", ["flexmoe", *words])
    before = sorted(store.iterdir())
    with pytest.raises(SystemExit) as stop:
        main()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and message in error and "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert sorted(store.iterdir()) == before
