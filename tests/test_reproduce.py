"""`flexmoe reproduce`: equal, different or impossible, from a folder or from its card alone."""

import json
import shutil

import pytest

from flexmoe.data import TINY
from flexmoe.errors import FlexmoeError
from flexmoe.exporter import export
from flexmoe.headers import read_json
from flexmoe.pipeline import CompressConfig, compress
from flexmoe.plan import read_manifest
from flexmoe.recover import recover
from flexmoe.recover_config import RecoverConfig
from flexmoe.reports.provenance import record_of
from flexmoe.reports.reproduce import compare, read_record, rerun
from flexmoe.reweigh import reweigh
from flexmoe.sources import Source, documents
from helpers import command

LAYERS, EXPERTS = 4, 16


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A family from a text file, recovered in closed form, and an export of it."""
    root = tmp_path_factory.mktemp("reproduce")
    (root / "text.txt").write_text(
        next(documents(Source(str(TINY / "books.train.jsonl.gz"))))[:6000]
    )
    data = str(root / "text.txt")
    config = CompressConfig(
        data=data, samples=16, seq_len=32, allocate="global", pruned=(0.2, 0.4), device="cpu"
    )
    compress("tiny", root / "family", config)
    better = RecoverConfig(mode="closed-form", data=data, tokens=512, seq_len=32, device="cpu")
    recover(root / "family", root / "better", better)
    export(root / "better", root / "ragged", pruned=0.4, layout="ragged")
    return root


def test_a_family_is_made_again_and_equal(made, capsys):
    assert command("reproduce", made / "family") == 0
    output = capsys.readouterr().out
    assert output.startswith("flexmoe compress tiny -o FAMILY --data ")
    assert output.rstrip().endswith("equal") and "DIFFERENT" not in output


def test_an_export_is_made_again_from_its_card_alone_and_goes_on(made, tmp_path, capsys):
    card, out = shutil.copy(made / "ragged" / "README.md", tmp_path / "card.md"), tmp_path / "again"
    record, original = read_record(card)
    assert original is None
    rerun(record, out)
    before = (out / "1-compress" / "config.json").stat().st_mtime_ns
    shutil.rmtree(out / "3-export")  # as if killed before the last step
    assert command("reproduce", card, "-o", out) == 0
    assert (out / "1-compress" / "config.json").stat().st_mtime_ns == before
    output = capsys.readouterr().out
    assert "recovery tokens" in output and f"kept: {out / '3-export'}" in output.replace("\n", "")
    with pytest.raises(FlexmoeError, match="exists already"):  # a rerun of another record
        rerun(record_of(made / "family"), out)


def test_another_text_is_different(made, capsys, tmp_path):
    other = tmp_path / "other.txt"
    other.write_text((made / "text.txt").read_text()[::-1])
    assert command("reproduce", made / "family", "--data", other) == 1
    output = " ".join(capsys.readouterr().out.split())
    assert "different: calibration tokens, plan, weights" in output
    assert "of the widths are equal, the largest difference is" in output


def test_differences_are_counted(made, tmp_path):
    record = record_of(made / "ragged")
    config = made / "ragged" / "config.json"
    changed = shutil.copytree(made / "ragged", tmp_path / "changed")
    about = read_json(config)
    width = about["quantization_config"]["widths"]["0"]
    width[3] += 8
    (changed / "config.json").write_text(json.dumps(about))
    recorded = record.model_copy(update={"weights_sha256": "0"})
    found = compare(recorded, made / "ragged", changed)
    assert found.different == ["weights"]
    share = 1 - 1 / (LAYERS * EXPERTS)
    assert found.details[0] == f"{share:.2%} of the widths are equal, the largest difference is 8"
    assert found.details[1] == "the largest difference of the weights is 0.0e+00"
    noted = {line.what for line in found.lines if line.equal is None}
    assert noted >= {"torch", "transformers", "flexmoe", "hardware", "hardware of recovery"}


def test_what_cannot_be_made_again(made, tmp_path, capsys):
    def refused(*words):
        assert command("reproduce", *words) == 2
        error = capsys.readouterr().err
        assert "Traceback" not in error and len(error.splitlines()) < 10
        return error

    card = (made / "family" / "README.md").read_text()
    path = tmp_path / "README.md"
    for change, said in (
        ({'"base_model": "tiny"': '"base_model": "/nowhere"'}, "say where with --model"),
        ({"text.txt": "gone.txt"}, "does not exist"),
        ({'"seq_len": 32,\n   "pruned"': '"seqlen": 32,\n   "pruned"'}, "seqlen"),
        ({'"seq_len": 32,\n   "pruned"': '"seq_len": "x",\n   "pruned"'}, "seq_len"),
    ):
        text = card
        for old, new in change.items():
            assert old in text
            text = text.replace(old, new)
        path.write_text(text)
        assert said in refused(path)
    assert "no card of flexmoe" in refused(TINY / "LICENSES.md")
    assert "is no card, family, plan or export" in refused(tmp_path / "nowhere")
    assert "is no card, family, plan or export" in refused(TINY / "model")
    old = shutil.copytree(made / "family", tmp_path / "old")
    about = read_json(old / "flexmoe.json")
    del about["recipe"]["options"], about["sha256"]
    (old / "flexmoe.json").write_text(json.dumps(about))
    assert read_manifest(old).recipe.options is None  # as written before options were kept
    assert "did not record its options" in refused(old)


def test_a_reweighed_plan_says_that_no_command_makes_it(made, tmp_path, capsys):
    reweigh(made / "family", "text", tmp_path / "plan")
    assert command("reproduce", tmp_path / "plan") == 2
    assert "options" in capsys.readouterr().err
