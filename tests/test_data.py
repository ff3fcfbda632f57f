"""Calibration and evaluation text."""

import gzip
import json
import shutil

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from flexmoe.data import (
    TINY,
    calibration_windows,
    check_tokens,
    evaluation_windows,
    load_tokenizer,
    parse_sources,
    pick_batch_size,
    pick_seq_len,
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


def test_default_sizes_and_their_limits():
    config = AutoConfig.from_pretrained(TINY / "model")
    assert pick_seq_len(None, config) == 256  # a quarter of the context
    assert [pick_batch_size(None, t) for t in (256, 2048, 9000)] == [8, 2, 1]
    for wrong in (1, 1025):
        with pytest.raises(FlexmoeError, match="from 2 to the model's context of 1024"):
            pick_seq_len(wrong, config)
    with pytest.raises(FlexmoeError, match="batch size"):
        pick_batch_size(0, 256)


def test_the_seed_draws_from_all_of_one_long_text(tmp_path, tokenizer):
    file = tmp_path / "long.txt"
    file.write_text(" ".join(f"w{n}" for n in range(20_000)))

    def make(seed):
        return calibration_windows(str(file), tokenizer, samples=8, seq_len=16, seed=seed).ids

    assert torch.equal(make(0), make(0))
    assert len({tuple(row.tolist()) for row in torch.cat([make(0), make(1)])}) == 16


def test_a_folder_without_tokenizer_files_is_refused(tmp_path):
    shutil.copy(TINY / "model" / "config.json", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(FlexmoeError, match="tokenizer"):
        load_tokenizer(tmp_path, config)
    assert len(load_tokenizer(TINY / "model", config)) == 4096


def test_tokens_of_another_model_are_refused():
    config = AutoConfig.from_pretrained(TINY / "model")
    with pytest.raises(FlexmoeError, match="token 5000, the model knows 4096"):
        check_tokens(torch.tensor([[1, 5000]]), config)


@pytest.mark.parametrize(
    ("content", "name"), [("caf\xe9".encode("latin-1"), "a.txt"), (b"no gzip", "b.txt.gz")]
)
def test_text_that_cannot_be_read_is_refused(tmp_path, tokenizer, content, name):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(FlexmoeError, match="cannot be read as UTF-8 text"):
        evaluation_windows(str(tmp_path / name), tokenizer, samples=1, seq_len=8)


@pytest.mark.parametrize(
    ("spec", "samples", "message"),
    [("tiny", 0, "samples must be"), ("tiny:3", 1, "no effect"), ("tiny,tiny", 1, "two data")],
)
def test_evaluations_that_make_no_sense_are_refused(tokenizer, spec, samples, message):
    with pytest.raises(FlexmoeError, match=message):
        evaluation_windows(spec, tokenizer, samples=samples, seq_len=8)


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
