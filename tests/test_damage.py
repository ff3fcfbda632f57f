"""Any damage to any byte of a plan or a curve is refused, and a full disk leaves none."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.curve import load_curve, save_curve
from flexmoe.evaluation.records import Curve, OfWeights
from flexmoe.files import write_whole
from flexmoe.plan import Plan
from helpers import random_plan
from zoo import tiny_model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plan alone."""
    base, folder = tmp_path_factory.mktemp("base"), tmp_path_factory.mktemp("plan")
    model = tiny_model("qwen3_moe")
    model.save_pretrained(base)
    random_plan(model, base).save(folder)
    return folder


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, float, int]:
    kind = draw(st.sampled_from(["flip", "cut", "insert"]))
    return kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.integers(1, 255))


def damage(content: bytes, kind: str, place: float, value: int) -> bytes:
    at = int(place * len(content))
    if kind == "flip":
        return content[:at] + bytes([content[at] ^ value]) + content[at + 1 :]
    if kind == "insert":
        return content[:at] + bytes([value]) + content[at:]
    return content[:at]


def means_the_same(a: bytes, b: bytes) -> bool:
    """White space between values is no damage."""
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


@pytest.mark.parametrize("file", ["flexmoe.json", "flexmoe.safetensors"])
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=damages())
def test_a_damaged_plan_is_refused(
    file: str, found: tuple[str, float, int], saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "plan"
    if not folder.exists():
        shutil.copytree(saved, folder)
    whole = (saved / file).read_bytes()
    changed = damage(whole, *found)
    (folder / file).write_bytes(changed)
    if means_the_same(whole, changed):
        Plan.load(folder)
    else:
        with pytest.raises(FlexmoeError):
            Plan.load(folder)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=damages())
def test_a_damaged_curve_is_refused(found: tuple[str, float, int], tmp_path: Path) -> None:
    curve = Curve(
        format=1, date="2026-01-01", of=OfWeights(plan_sha256="a", weights_sha256="b"), data="tiny",
        files={}, pairs=None, hardware="none", dtype="float32", versions={}, budgets=[],
    )  # fmt: skip
    path = save_curve(tmp_path, curve)
    whole = path.read_bytes()
    changed = damage(whole, *found)
    path.write_bytes(changed)
    if means_the_same(whole, changed):
        assert load_curve(tmp_path) == curve
    else:
        with pytest.raises(FlexmoeError):
            load_curve(tmp_path)


def test_plans_from_before_there_was_a_checksum_load(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "plan")
    path = tmp_path / "plan" / "flexmoe.json"
    fields = json.loads(path.read_text())
    del fields["sha256"]
    path.write_text(json.dumps(fields))
    now, before = Plan.load(tmp_path / "plan"), Plan.load(saved)
    assert now.recipe == before.recipe and now.budgets == before.budgets
    assert all(torch.equal(now.order[i], before.order[i]) for i in before.layers)


def test_a_write_that_fails_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    write_whole(tmp_path / "a.json", b"before")
    monkeypatch.setattr("flexmoe.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(tmp_path / "a.json", b"after")
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_bytes() == b"before"
