"""Calibration and evaluation text."""

import functools
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


def test_a_source_that_would_give_nothing_is_refused(tokenizer):
    read = functools.partial(calibration_windows, tokenizer=tokenizer, seq_len=24, seed=0)
    with pytest.raises(FlexmoeError, match=r"'code.train' would give none of 32 .*more --samples"):
        read("books.train:100,code.train:1", samples=32)
    assert len(read("books.train:100,code.train:1", samples=101).ids) == 101
    assert len(read("tiny", samples=2).ids) == 2


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


def test_a_damaged_tokenizer_is_refused(tmp_path):
    for file in (TINY / "model").glob("*.json"):
        shutil.copy(file, tmp_path)
    found = json.loads((tmp_path / "tokenizer.json").read_text())
    found["model"]["merges"].append(["no", "such"])
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    with pytest.raises(FlexmoeError, match=r"tokenizer in .* cannot be loaded"):
        load_tokenizer(tmp_path, AutoConfig.from_pretrained(TINY / "model"))


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
        ('{"text": "a \\ud83d b"}\n', "{}", "line 1: .*ud83d' is half of a surrogate"),
        ('{"text": "short"}\n', "{}", "no text for one window of 64 tokens: lower --seq-len"),
        (f'{{"text": "{"a " * 200}"}}\n', "{}", "windows of 64 tokens, 4 are wanted"),
        ('{"text": "short"}\n', "{}:0", "weight must be above 0"),
    ],
)
def test_bad_data_is_refused(tmp_path, tokenizer, content, spec, message):
    file = tmp_path / "data.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(FlexmoeError, match=message):
        calibration_windows(spec.format(file), tokenizer, samples=4, seq_len=64, seed=0)


CHAT = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|endoftext|>{% endfor %}"


def chats(path, number, **field):
    """A file of conversations; ``field`` replaces the last one."""
    talks = [
        {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "bot", "content": "a " * 30}]}
        for n in range(number)
    ]
    path.write_text("".join(json.dumps(talk) + "\n" for talk in [*talks[:-1], field or talks[-1]]))
    return path


def test_conversations_are_packed_as_the_template_writes_them(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    file = chats(tmp_path / "chat.jsonl", 12)
    with pytest.raises(FlexmoeError, match="no chat template"):
        calibration_windows(str(file), tokenizer, samples=1, seq_len=16, seed=0)
    tokenizer.chat_template = CHAT
    ids = evaluation_windows(str(file), tokenizer, samples=None, seq_len=16)["chat"]
    text = tokenizer.decode(ids.flatten())
    assert text.startswith("<|user|>q0<|endoftext|><|bot|>a a a")
    assert text.count("<|bot|>") == 12 and "<|endoftext|><|user|>q11" in text
    mixed = calibration_windows(f"{file}:1,books.train:1", tokenizer, samples=8, seq_len=16, seed=0)
    assert mixed.source_n.bincount().tolist() == [4, 4]


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"messages": ["hello"]}, "line 3: 'messages' must be objects with a role"),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"found \['conversations'\]"),
        ({"messages": [{"role": "user", "content": "x"}]}, "does not fit .*: roles must alternate"),
    ],
)
def test_bad_conversations_are_refused(tmp_path, field, message):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    wrong = (
        "{% if messages | length == 1 %}{{ raise_exception('roles must alternate') }}{% endif %}"
    )
    tokenizer.chat_template = wrong + CHAT
    file = chats(tmp_path / "chat.jsonl", 3, **field)
    with pytest.raises(FlexmoeError, match=message):
        evaluation_windows(str(file), tokenizer, samples=None, seq_len=8)


def test_end_and_begin_stand_between_documents_where_they_differ(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY / "model")
    tokenizer.bos_token = "x"
    file = lines(tmp_path / "x.jsonl", "hello there", "general words " * 20)
    ids = evaluation_windows(str(file), tokenizer, samples=None, seq_len=8)["x"]
    assert tokenizer.decode(ids.flatten()).startswith("xhello there<|endoftext|>xgeneral")


def test_sources_and_weights_of_a_mixture(tmp_path, tokenizer):
    a, b = tmp_path / "a" / "part.jsonl", tmp_path / "b" / "part.jsonl"
    for file, text in ((a, "aaaa "), (b, "zzzz ")):
        file.parent.mkdir()
        lines(file, *[text * 200] * 20)
    found = calibration_windows(f"{a}:512,{b}:256", tokenizer, samples=6, seq_len=16, seed=0)
    assert found.sources == (str(a), str(b))  # of one name, so by their paths
    assert found.source_n.bincount().tolist() == [4, 2]
    for s, letter in enumerate("az"):
        of_source = found.ids[found.source_n == s]
        assert all(letter * 3 in tokenizer.decode(row) for row in of_source)
    batches = found.batches(3)
    assert [(name, len(ids)) for name, ids in batches] == [(str(a), 3), (str(a), 1), (str(b), 2)]
    # given twice is given once, with both weights
    twice = calibration_windows(f"{a}:1,{b}:1,{a}:1", tokenizer, samples=6, seq_len=16, seed=0)
    assert twice.source_n.bincount().tolist() == [4, 2]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_folder_is_read_as_a_data_set(tmp_path, tokenizer, kind):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"text": f"number {n} of the words that are in this set"} for n in range(400)]
    if kind == "jsonl":
        lines(folder / "train.jsonl", *[row["text"] for row in rows])
    else:
        datasets.Dataset.from_list(rows).to_parquet(folder / "train.parquet")
    make = lambda seed: calibration_windows(  # noqa: E731
        f"{folder}(train):2", tokenizer, samples=6, seq_len=16, seed=seed
    )
    first, again, other = make(0), make(0), make(1)
    assert first.sha256 == again.sha256 != other.sha256
    assert first.sources == (f"{folder}(train)",)
    ordered = evaluation_windows(f"{folder}(train)", tokenizer, samples=2, seq_len=16)
    assert "number 0 of the words" in tokenizer.decode(ordered[f"{folder}(train)"].flatten())
    for wrong, message in (
        (f"{folder}(test)", "split 'test'.*cannot be read: Bad split"),
        (f"{folder}[other]", "'other' not found"),
    ):
        with pytest.raises(FlexmoeError, match=message):
            calibration_windows(wrong, tokenizer, samples=1, seq_len=16, seed=0)


def test_only_what_is_needed_of_a_stream_is_read(tokenizer, monkeypatch):
    read = []

    def endless(source, seed):
        while True:
            read.append(1)
            yield {"text": "many words " * 10}

    monkeypatch.setattr("flexmoe.sources._records", endless)
    found = calibration_windows("some/set[en](train)", tokenizer, samples=2, seq_len=16, seed=0)
    assert len(found.ids) == 2 and len(read) < 20
    read.clear()
    evaluation_windows("some/set", tokenizer, samples=2, seq_len=16)
    assert len(read) < 5


def test_without_a_network_a_hub_id_is_a_clear_error(tokenizer):
    pytest.importorskip("datasets")
    with pytest.raises(FlexmoeError, match=r"'a/b\[c\]\(d\)' \(split 'd'\) cannot be read: .*Hub"):
        calibration_windows("a/b[c](d)", tokenizer, samples=1, seq_len=16, seed=0)


def test_other_formats_are_refused(tmp_path, tokenizer):
    (tmp_path / "data.csv").write_text("x")
    with pytest.raises(FlexmoeError, match=r"expected a file ending in \.jsonl"):
        evaluation_windows(str(tmp_path / "data.csv"), tokenizer, samples=1, seq_len=8)
