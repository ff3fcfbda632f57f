"""Calibration and evaluation text."""

import gzip
import json

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from flexmoe.data import (
    TINY,
    calibration_windows,
    default_seq_len,
    evaluation_windows,
    parse_sources,
)
from flexmoe.errors import FlexmoeError


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY / "model")


def lines(path, *texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def test_names_and_weights():
    assert [s.name for s in parse_sources("tiny", "valid")] == [
        "books.valid", "code.valid", "math.valid", "tech.valid",
    ]  # fmt: skip
    assert [s.name for s in parse_sources("books.valid", "train")] == ["books.valid"]
    assert [s.weight for s in parse_sources("math.train:3,tiny:2", "train")] == [
        3,
        0.5,
        0.5,
        0.5,
        0.5,
    ]


def test_windows_are_full_drawn_by_seed_and_hashed(tokenizer):
    make = lambda seed: calibration_windows("tiny", tokenizer, samples=10, seq_len=32, seed=seed)  # noqa: E731
    first, again, other = make(0), make(0), make(1)
    assert first.ids.shape == (10, 32)
    assert torch.equal(first.ids, again.ids) and first.sha256 == again.sha256
    assert first.sha256 != other.sha256


def test_weights_set_the_shares_of_a_mixture(tmp_path, tokenizer):
    a = lines(tmp_path / "a.jsonl", *["aaaa " * 200] * 20)
    b = tmp_path / "b.txt.gz"
    b.write_bytes(gzip.compress(b"zzzz " * 4000))
    windows = calibration_windows(f"{a}:3,{b}:1", tokenizer, samples=16, seq_len=24, seed=0)
    letters = [tokenizer.decode(row)[12] for row in windows.ids]
    assert sum("z" in tokenizer.decode(row) for row in windows.ids) == 4, letters


def test_documents_are_separated_and_evaluation_keeps_the_order(tmp_path, tokenizer):
    file = lines(tmp_path / "x.jsonl", "hello there", "general words " * 20)
    ids = evaluation_windows(str(file), tokenizer, samples=None, seq_len=8)["x"]
    assert tokenizer.decode(ids.flatten()).startswith(
        "<|endoftext|>hello there<|endoftext|>general"
    )
    assert len(evaluation_windows(str(file), tokenizer, samples=1, seq_len=8)["x"]) == 1


def test_default_window_is_a_quarter_of_the_context():
    assert default_seq_len(AutoConfig.from_pretrained(TINY / "model")) == 256


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        (None, "nowhere.jsonl", "does not exist"),
        (None, "", "empty"),
        ('{"content": "x"}\n', "{}", "line 1: expected an object with a field 'text'"),
        ("oops\n", "{}", "line 1: not valid JSON"),
        ('{"text": "short"}\n', "{}", "has text for 0 windows"),
        ('{"text": "short"}\n', "{}:0", "weight must be above 0"),
    ],
)
def test_bad_data_is_refused(tmp_path, tokenizer, content, spec, message):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(FlexmoeError, match=message):
        calibration_windows(spec.format(file), tokenizer, samples=4, seq_len=64, seed=0)


def test_other_formats_are_refused(tmp_path, tokenizer):
    (tmp_path / "data.csv").write_text("x")
    with pytest.raises(FlexmoeError, match=r"expected a file ending in \.jsonl"):
        evaluation_windows(str(tmp_path / "data.csv"), tokenizer, samples=1, seq_len=8)
