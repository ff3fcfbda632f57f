"""Killed at any moment and started again: the same files, nothing left, nobody else's state."""

import importlib
import json
from dataclasses import replace
from itertools import islice

import pytest
import torch

from flexmoe.actions import ActionConfig
from flexmoe.errors import FlexmoeError
from flexmoe.learn import LearnConfig
from flexmoe.pipeline import CompressConfig, compress
from flexmoe.plan import Plan
from flexmoe.progress import Steps, bar
from flexmoe.resume import Work, work_folder

CONFIG = CompressConfig(
    data="books.train:2,code.train:1,math.train:1",
    samples=12,
    seq_len=24,
    batch_size=2,
    pruned=(0.3, 0.6),
    learn=LearnConfig(steps=4),
    device="cpu",
)


def dies_after(ticks, seen):
    """A track that notes each step that it let pass, and ends the run after ``ticks`` of them."""
    left = [ticks]

    def track(items, description):
        for item in items:
            yield item
            seen.append((description, item))
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt

    return track


def files(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The family of an unbroken run."""
    out = tmp_path_factory.mktemp("whole") / "family"
    compress("tiny", out, CONFIG)
    return out


def test_a_run_killed_again_and_again_ends_with_the_same_files(
    whole, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("flexmoe.resume.EVERY", 0.0)
    out, seen, kills = tmp_path / "out", [], 0
    for ticks in (2, 3, 3, 2, 20, 300, 10_000):  # writing has a step for every tensor
        try:
            compress("tiny", out, CONFIG, track=dies_after(ticks, seen))
        except KeyboardInterrupt:
            kills += 1
            assert not out.exists()
            assert f"the same command goes on from '{out}.work'" in caplog.text
            caplog.clear()
            with pytest.raises(FlexmoeError, match=r"another command.*seed 0 there, 1 now"):
                compress("tiny", out, replace(CONFIG, seed=1))
            continue
        break
    assert kills >= 5
    assert files(out) == files(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    # the last step before a kill was not kept yet; no other one was made twice
    for stage, steps in (("observe", 7), ("learn", 4)):
        done = [item for description, item in seen if description == stage]
        assert sorted(set(done)) == list(range(steps)) and len(done) <= steps + kills


def test_killed_when_all_was_done(whole, tmp_path, monkeypatch):
    out = tmp_path / "out"

    def killed(work):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Work, "clear", killed)
        compress("tiny", out, CONFIG)
    assert work_folder(out).is_dir()
    with pytest.raises(FlexmoeError, match="another command"):
        compress("tiny", out, replace(CONFIG, samples=4))
    plan = compress("tiny", out, CONFIG)
    assert plan.recipe == Plan.load(whole).recipe
    assert files(out) == files(whole)
    assert not work_folder(out).exists()


@pytest.mark.parametrize("learn", [LearnConfig(steps=10**9), ActionConfig(steps=10**9)])
def test_batches_are_drawn_when_they_are_needed(learn, tmp_path, monkeypatch):
    """A run of any length begins at once, and takes no memory for steps to come."""
    where = type(learn).__module__
    drawn = importlib.import_module(where).batches

    def few(*args):
        yield from islice(drawn(*args), 3)
        raise AssertionError("more than are needed")

    monkeypatch.setattr(f"{where}.batches", few)
    rule = "learned" if isinstance(learn, LearnConfig) else "actions"
    config = replace(CONFIG, allocate=rule, learn=learn)
    with pytest.raises(KeyboardInterrupt):  # of the pass there are 7 batches
        compress("tiny", tmp_path / "out", config, track=dies_after(8, []))


def test_what_a_killed_write_left_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr("flexmoe.files._in_use", lambda pid: False)
    stale = tmp_path / ".out.partial-123"
    stale.mkdir()
    config = replace(CONFIG, samples=4, allocate="global", learn=None)
    seen = []
    with pytest.raises(KeyboardInterrupt):  # before there is need for the room
        compress("tiny", tmp_path / "out", config, track=dies_after(1, seen))
    assert not stale.exists()


def test_other_text_under_the_same_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("flexmoe.resume.EVERY", 0.0)
    text = tmp_path / "a.txt"
    text.write_text("one two three four five six " * 400)
    config = replace(CONFIG, data=str(text), samples=8, allocate="global", learn=None)
    with pytest.raises(KeyboardInterrupt):
        compress("tiny", tmp_path / "out", config, track=dies_after(2, []))
    text.write_text("six five four three two one " * 400)
    with pytest.raises(FlexmoeError, match=r"another command.*data_sha256"):
        compress("tiny", tmp_path / "out", config)


def test_another_command_takes_over_where_nothing_was_saved(tmp_path, caplog):
    out = tmp_path / "out"
    first = replace(CONFIG, samples=4, allocate="global", learn=None)
    with pytest.raises(KeyboardInterrupt):
        compress("tiny", out, first, track=dies_after(1, []))
    assert "nothing was saved yet, the same command begins again" in caplog.text
    assert work_folder(out).is_dir()
    assert compress("tiny", out, replace(first, seed=1)).recipe.seed == 1
    assert not work_folder(out).exists()
    # what a kill at the very end of a run leaves is no state of another command's
    left = Work(out, {"a": 1})
    with left.on(data="1"):
        pass
    with pytest.raises(FlexmoeError, match="exists"):
        compress("tiny", out, first)


def test_a_mistake_leaves_no_state(tmp_path):
    method = tmp_path / "mine.py"
    method.write_text(
        "import flexmoe, torch\n"
        "@flexmoe.method('wrong', paper='none')\n"
        "def score(layer, stats):\n    return torch.ones(1)\n"
    )
    config = replace(CONFIG, method=f"{method}:score", samples=4, allocate="global", learn=None)
    with pytest.raises(FlexmoeError, match="without effect"):
        compress("tiny", tmp_path / "out", config)
    bare = CompressConfig(method=f"{method}:score", allocate="global")
    with pytest.raises(FlexmoeError, match="gave shape"):
        compress("tiny", tmp_path / "out", bare)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_state_is_whole_or_not_there(tmp_path):
    work = Work(tmp_path / "x", {"a": 1})
    with work.on(data="1"):
        stage = work.stage("s")
        assert stage.load() is None
        for step in (1, 2):
            stage.save(step, {"t": torch.full((3,), float(step))})
        step, found = stage.load()
        assert step == 2 and torch.equal(found["t"], torch.full((3,), 2.0))
        assert len(list(work.path.glob("s-*"))) == 1
    with pytest.raises(FlexmoeError, match="data 1 there, 2 now"), work.on(data="2"):
        pass
    (work.path / "s.json").write_text(json.dumps({"step": 1}))
    with pytest.raises(FlexmoeError, match="damaged"):
        stage.load()
    with pytest.raises(FlexmoeError, match="wrong"), work.on(data="1"):
        raise FlexmoeError("wrong")
    assert not work.path.exists()


def test_two_runs_of_a_command_do_not_share_its_state(tmp_path):
    work, other = (Work(tmp_path / "x", {"a": 1}) for _ in range(2))
    with work.on(data="1"):
        work.stage("s").save(1, {"t": torch.ones(1)})
        with pytest.raises(FlexmoeError, match="another process is making"), other.on(data="1"):
            pass
        assert work.stage("s").load()
    with other.on(data="1"):
        assert other.stage("s").load()


def test_writing_takes_a_twentieth_of_the_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("flexmoe.resume.time.monotonic", lambda: now[0])
    stage = Work(tmp_path / "x", {}).stage("s")
    now[0] = 19.0
    assert not stage.due
    now[0] = 20.0
    assert stage.due
    stage.took, stage.written = 30.0, 20.0
    now[0] = 20.0 + 599
    assert not stage.due
    now[0] = 20.0 + 600
    assert stage.due


def test_a_log_file_gets_lines(capsys):
    assert list(bar(Steps(3, 5, 1000), "observe")) == [3, 4]
    said = capsys.readouterr().err
    assert "observe 5/5" in said and "tokens/s" in said and "GiB" in said and "left 0 s" in said
