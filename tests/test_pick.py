"""pick: the member that fits, from a curve made by hand; what it says when none does."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from flexmoe.cli.pick import _lines as lines
from flexmoe.data import TINY
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.curve import save_curve
from flexmoe.evaluation.pick import Candidate, Picked, Wanted, choose, pick
from flexmoe.evaluation.records import (
    Curve,
    OfWeights,
    PairsPoint,
    Point,
    Reference,
    TaskPoint,
)
from flexmoe.family import load_stock
from flexmoe.plan import Member
from flexmoe.reports.report import parse_bytes, parse_count
from flexmoe.routing.rules import export_options
from helpers import random_plan

KEPT = {0.0: (1.0, 1.0), 0.2: (0.98, 1.01), 0.4: (0.96, 0.99), 0.6: (0.80, 0.97)}  # loss, pairs


def point(member: Member, by_loss: float, by_pairs: float | None) -> Point:
    pairs = None
    if by_pairs is not None:
        pairs = PairsPoint(
            n=100, accuracy=0.7 * by_pairs, interval=(0.6, 0.8), fields={}, ratio=by_pairs,
            ratio_interval=(by_pairs - 0.01, by_pairs + 0.01), margin_ratio=None,
            margin_ratio_interval=None,
        )  # fmt: skip
    increase = -math.log(by_loss)
    return Point(
        **member.model_dump(), nll=3 + increase, files={"text": 3 + increase}, increase=increase,
        increase_interval=(increase, increase), kept=by_loss, kept_interval=(by_loss, by_loss),
        pairs=pairs,
    )  # fmt: skip


def member(pruned: float) -> Member:
    routed = round(1000 * (1 - pruned))
    return Member(
        pruned=pruned, achieved=pruned, routed_parameters=routed, active_parameters=routed // 4,
        bytes=2 * (routed + 200),
    )  # fmt: skip


def candidates(measured=tuple(KEPT)) -> list[Candidate]:
    """Four members: 2400, 2000, 1600, 1200 bytes; 1200, 1000, 800, 600 parameters."""
    return [
        Candidate(m, 200 + m.routed_parameters, point(m, *KEPT[s]) if s in measured else None)
        for s, m in ((share, member(share)) for share in KEPT)
    ]


@pytest.mark.parametrize(
    ("wanted", "pruned"),
    [
        ({"keep": 0.95}, 0.4),
        ({"keep": 0.96}, 0.4),  # at least
        ({"keep": 1.0}, 0.0),
        ({"keep": 0.95, "by": "pairs"}, 0.6),
        ({"keep": 1.0, "by": "pairs"}, 0.2),  # the poorest that keeps it
        ({"memory": 2000}, 0.2),
        ({"memory": 1999}, 0.4),
        ({"memory": 10**12}, 0.0),
        ({"params": 999}, 0.4),
        ({"params": 700, "memory": 2000}, 0.6),
        ({"memory": 2000, "keep": 0.9}, 0.2),  # the richest that does all
        ({"memory": 1700, "keep": 0.9, "params": 900}, 0.4),
    ],
)
def test_the_member_that_fits(wanted, pruned):
    assert choose(candidates(), Wanted(**wanted)).member.pruned == pruned


def test_members_that_were_not_measured_are_no_choice_by_quality():
    found = candidates(measured=(0.0, 0.2))
    assert choose(found, Wanted(keep=0.5)).member.pruned == 0.2
    assert choose(found, Wanted(memory=1600)).member.pruned == 0.4
    with pytest.raises(FlexmoeError, match=r"within 1,600 bytes was measured, the first is .*40 %"):
        choose(found, Wanted(memory=1600, keep=0.5))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"memory": 1199}, r"no member fits 1,199 bytes: the smallest is the one at 60 % .*1,200"),
        ({"params": 5}, r"no member fits 5 parameters: .* 600 parameters.*compress again"),
        (
            {"memory": 1200, "keep": 0.9},
            r"1,200 bytes keeps 0\.9 of the likelihood per token: it takes the one at 40 % .*"
            r"The best within is the one at 60 % .* it keeps 0\.8\.",
        ),
        (
            {"memory": 1600, "params": 900, "keep": 1.0, "by": "pairs"},
            r"1,600 bytes and 900 parameters keeps 1 of the accuracy .* the one at 20 % .*"
            r"The best within is the one at 40 %",
        ),
    ],
)
def test_nothing_fits(wanted, message):
    with pytest.raises(FlexmoeError, match=message):
        choose(candidates(), Wanted(**wanted))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, "give --keep 0.95, --memory 24GiB or --params 20B"),
        ({"keep": 95.0}, "95 % is 0.95"),
        ({"keep": 0.0}, "above 0"),
        ({"keep": math.nan}, "above 0"),
        ({"keep": 0.9, "by": "pair"}, "Did you mean 'pairs'"),
        ({"memory": 1, "by": "pairs"}, "no effect without --keep"),
    ],
)
def test_wishes_that_are_none(wanted, message):
    with pytest.raises(FlexmoeError, match=message):
        Wanted(**wanted)


def test_units():
    for text, number in (
        ("123", 123), ("24GiB", 24 * 2**30), ("24 gb", 24 * 10**9), ("1.5KiB", 1536),
        ("2MB", 2 * 10**6), ("2.3kb", 2300), (".5MiB", 2**19), ("1TB", 10**12),
    ):  # fmt: skip
        assert parse_bytes(text) == number
    for text, number in (
        ("20B", 20 * 10**9), ("1.5b", 15 * 10**8), ("300M", 3 * 10**8), ("2T", 2 * 10**12),
        ("5k", 5000), ("7", 7),
    ):  # fmt: skip
        assert parse_count(text) == number
    for text in ("24G", "24GiBs", "GiB", "-1GB", "0", "1e9", "nan", "", "1 000MB", "9" * 400):
        with pytest.raises(FlexmoeError, match=r"expected a number above 0 such as 24GiB"):
            parse_bytes(text)
    with pytest.raises(FlexmoeError, match=r"--params '20GB': expected .* 20B"):
        parse_count("20GB")


@pytest.fixture(scope="module")
def plan():
    return random_plan(load_stock("tiny", device="cpu"), TINY / "model")


def curve(plan, shares=tuple(KEPT), *, plan_sha256, pairs=True, against=None) -> Curve:
    points = [point(plan.member(s), KEPT[s][0], KEPT[s][1] if pairs else None) for s in shares]
    return Curve(
        format=1, date="2026-01-01T00:00:00+00:00", data="tiny", files={}, pairs=None,
        of=OfWeights(plan_sha256=plan_sha256, weights_sha256=""), hardware="", dtype="float32",
        versions={}, against=against, budgets=points,
    )  # fmt: skip


def save(folder: Path, plan, *shares, **changes) -> None:
    """A plan alone with a curve of ``shares`` (None without)."""
    sha256 = plan.save(folder).tensors_sha256
    if shares:
        save_curve(folder, curve(plan, shares, **{"plan_sha256": sha256} | changes))


def test_pick_from_a_folder(plan, tmp_path):
    save(tmp_path, plan, *KEPT)
    found = pick(tmp_path, Wanted(keep=0.95))
    assert found.candidate.member == plan.member(0.4) and found.notes == ()
    assert found.curve.data == "tiny" and found.candidate.quality.kept == 0.96
    parameters = sum(p.numel() for p in load_stock("tiny", device="cpu").parameters())
    removed = plan.routed_parameters - plan.member(0.4).routed_parameters
    assert found.candidate.parameters == parameters - removed
    assert found.export == (
        f"flexmoe export {tmp_path} --pruned 0.4 --layout ragged -o {tmp_path}-40"
    )
    assert pick(f"{tmp_path}/", Wanted(keep=1.0)).export is None
    assert pick(f"{tmp_path}/", Wanted(keep=0.97)).export.endswith(f"-o {tmp_path}-20")


@pytest.mark.parametrize(
    ("router", "last", "options"),
    [
        ("keep", [4, 0], "--layout ragged"),
        ("remove", [0, 4], "--layout uniform"),
        ("remove", [4, 4], "--layout ragged --router keep"),
    ],
)
def test_the_export_is_one_that_the_router_rule_allows(router, last, options):
    widths = {0: torch.tensor([4, 0]), 1: torch.tensor(last)}
    plan = SimpleNamespace(recipe=SimpleNamespace(router=router), widths=lambda pruned: widths)
    assert export_options(plan, 0.5) == options


def test_the_screen_says_what_is_compared_and_the_task_that_counts():
    tasks = {
        name: TaskPoint(
            metric="acc", value=0.5, interval=None, n=9, metrics={}, ratio=ratio,
            ratio_interval=spread,
        )
        for name, ratio, spread in (
            ("a", 0.99, None), ("b", 0.97, (0.951, 0.983)), ("less_is_better", None, None)
        )
    }  # fmt: skip
    chosen = candidates()[2]
    chosen = replace(chosen, quality=chosen.quality.model_copy(update={"tasks": tasks}))
    of = SimpleNamespace(base="big", data="tiny")
    text = "\n".join(lines("fam", Picked(chosen, of, "flexmoe export", "uniform")))
    assert "97.0% (95.1% to 98.3%) of the score of big on b, the lowest of 3 tasks" in text
    assert "bytes) as a uniform export: weights only" in text
    assert "keeps 96.0% (96.0% to 96.0%) of the likelihood per token of big" in text
    assert "of those of big" in text and "full model" not in text


def test_pick_by_size_needs_no_curve(plan, tmp_path):
    save(tmp_path, plan)
    found = pick(tmp_path, Wanted(memory=plan.member(0.2).bytes))
    assert found.candidate.member.pruned == 0.2 and found.candidate.quality is None
    assert found.curve is None and found.notes == ()
    with pytest.raises(FlexmoeError, match=r"no saved curve .*: run flexmoe eval .* --save"):
        pick(tmp_path, Wanted(keep=0.9))


def test_parameters_of_a_family_are_those_of_its_files(plan, tmp_path):
    shutil.copytree(TINY / "model", tmp_path / "family")
    plan.save(tmp_path / "family", ranked=True)
    parameters = sum(p.numel() for p in load_stock("tiny", device="cpu").parameters())
    found = pick(tmp_path / "family", Wanted(params=parameters))
    assert found.candidate.member.pruned == 0 and found.candidate.parameters == parameters


def test_a_curve_in_part(plan, tmp_path):
    save(tmp_path, plan, 0.0, 0.4, pairs=False)
    found = pick(tmp_path, Wanted(keep=0.9))
    assert found.candidate.member.pruned == 0.4
    assert "not measured and so left out: 0.2, 0.6" in found.notes[0]
    with pytest.raises(FlexmoeError, match=r"has no pairs: run flexmoe eval .* --pairs FILE --sav"):
        pick(tmp_path, Wanted(keep=0.9, by="pairs"))


def test_a_curve_of_another_base_is_measured_again_against_that(plan, tmp_path):
    base = Reference(model="the big", nll=3, files={}, pairs=None, routed_parameters=9, bytes=9)
    save(tmp_path, plan, 0.0, 0.4, pairs=False, against=base)
    measure = f"flexmoe eval {tmp_path} --against 'the big'"
    assert f"measure all with {measure} --save" in pick(tmp_path, Wanted(keep=0.9)).notes[0]
    with pytest.raises(FlexmoeError, match=f"{measure} --pairs FILE --save"):
        pick(tmp_path, Wanted(keep=0.9, by="pairs"))


def test_a_stale_curve(plan, tmp_path):
    save(tmp_path, plan, *KEPT, plan_sha256="0" * 64)
    with pytest.raises(FlexmoeError, match=r"another one .* on 2026-01-01: measure again with fle"):
        pick(tmp_path, Wanted(keep=0.9))
    found = pick(tmp_path, Wanted(memory=10**12))
    assert found.candidate.quality is None and "another one" in found.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"not valid JSON .*measure again: flexmoe eval"),
        ("[]", "has format None"),
        ('{"format": 9}', "has format 9, this flexmoe reads format 1"),
        ('{"format": 1}', "Field required: measure again"),
    ],
)
def test_a_damaged_curve(plan, tmp_path, content, message):
    save(tmp_path, plan)
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(FlexmoeError, match=message):
        pick(tmp_path, Wanted(keep=0.9))


def test_the_saved_file_is_plain_json(plan, tmp_path):
    save(tmp_path, plan, *KEPT)
    assert [file.name for file in tmp_path.glob("*.partial")] == []
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["pruned"] for row in found["budgets"]] == list(KEPT)
    with pytest.raises(FlexmoeError, match="not a flexmoe family or plan"):
        pick("tiny", Wanted(keep=0.9))
