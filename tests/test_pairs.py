"""Minimal pairs: files, scores against a naive loop, accuracies and their intervals."""

import gzip
import math
from functools import partial

import pytest
import torch

import flexmoe
from flexmoe.data import TINY, load_tokenizer
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.intervals import share_interval
from flexmoe.evaluation.pairs import (
    Pair,
    encode,
    pair_rows,
    read_pairs,
    right_pairs,
    sequence_scores,
)
from minimal import made_pairs, write_pairs


@pytest.fixture(scope="module")
def tiny():
    model = flexmoe.load("tiny", dtype=torch.float32, device="cpu")
    return model, load_tokenizer(TINY / "model", model.config)


def naive(model, tokenizer, text):
    """Log-probability of one sentence, alone in its batch, token by token."""
    ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(log_p[at, token]) for at, token in enumerate(ids[1:]))


def test_pairs_are_scored_as_by_a_naive_loop(tiny, tmp_path):
    model, tokenizer = tiny
    records = made_pairs(12)
    for record in records[::3]:  # the model is right on all of them: let some be wrong
        good, bad = record["sentence_good"], record["sentence_bad"]
        record |= {"sentence_good": bad, "sentence_bad": good}
    pairs = read_pairs(write_pairs(tmp_path / "pairs.jsonl", records))
    wanted = torch.tensor(
        [float(naive(model, tokenizer, p.good) > naive(model, tokenizer, p.bad)) for p in pairs]
    )
    assert 0 < wanted.sum() < len(pairs)
    encoded = encode(pairs, tokenizer, model.config)
    for step in (1, 64, 4096):
        opened = []

        def member(key, opened=opened):
            opened.append(key)
            return model

        members = {key: partial(member, key) for key in (0.0, 0.4)}
        found = right_pairs(members, encoded, tokens_per_step=step)
        assert opened == [0.0, 0.4]
        assert torch.equal(found[0.0], wanted.double()) and torch.equal(found[0.4], found[0.0])


def test_padding_does_not_count(tiny):
    model, tokenizer = tiny
    texts = ["He runs.", "The cats that the dog chased were running home as fast as they could."]
    sentences = [[0, *tokenizer(text, add_special_tokens=False)["input_ids"]] for text in texts]
    assert len(sentences[1]) > 2 * len(sentences[0])
    together = sequence_scores(model, sentences)
    for text, ids, score in zip(texts, sentences, together, strict=True):
        assert float(score) == pytest.approx(float(sequence_scores(model, [ids])), abs=1e-4)
        assert float(score) == pytest.approx(naive(model, tokenizer, text), abs=1e-4)


def test_the_same_tokens_are_scored_once_and_tie(tiny):
    model, tokenizer = tiny
    pairs = [Pair("He runs.", "He runs.", "", "", 1), Pair("He runs.", "He run.", "", "", 2)]
    encoded = encode(pairs, tokenizer, model.config)
    assert len(encoded.sequences) == 2 and all(ids[0] == 0 for ids in encoded.sequences)
    found = right_pairs({0.0: lambda: model}, encoded)
    assert float(found[0.0][0]) == 0.5 and float(found[0.0][1]) in (0.0, 1.0)


def test_first_of_each_paradigm_plain_or_gzipped(tmp_path):
    records = made_pairs(20)
    plain = write_pairs(tmp_path / "p.jsonl", records)
    packed = tmp_path / "p.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_pairs(plain) == read_pairs(packed) and len(read_pairs(plain)) == 20
    first = read_pairs(packed, 3)
    assert [pair.paradigm for pair in first].count("agreement") == 3
    assert [pair.line for pair in first] == [1, 2, 3, 4, 5, 6]
    bare = [{key: r[key] for key in ("sentence_good", "sentence_bad")} for r in records]
    assert len(read_pairs(write_pairs(tmp_path / "bare.jsonl", bare), 5)) == 5


def right(*values):
    return torch.tensor(values, dtype=torch.float64)


def pairs_of(*paradigms):
    return [Pair("a", "b", name, f"field {name}", n) for n, name in enumerate(paradigms, 1)]


def test_accuracy_fields_and_ratios():
    pairs = pairs_of(*["x"] * 40, *["y"] * 60)
    base = right(*[1.0] * 36, *[0.0] * 4, *[1.0] * 54, *[0.0] * 6)
    poorer = base.clone()
    poorer[:10] = 0.0
    poorer[10:14] = 0.5
    rows = pair_rows(pairs, {0.0: base, 0.4: poorer})
    assert rows[0.0]["accuracy"] == pytest.approx(0.9) and rows[0.0]["n"] == 100
    assert rows[0.0]["ratio"] == 1 and rows[0.0]["ratio_interval"] == (1, 1)
    row = rows[0.4]
    assert row["accuracy"] == pytest.approx(0.78)
    assert row["fields"] == pytest.approx({"field x": 24 / 40, "field y": 0.9})
    assert row["ratio"] == pytest.approx(0.78 / 0.9)
    assert row["margin_ratio"] == pytest.approx(0.28 / 0.4)
    for name, spread in (("accuracy", "interval"), ("ratio", "ratio_interval")):
        low, high = row[spread]
        assert low < row[name] < high
    low, high = row["margin_ratio_interval"]
    assert low < 0.7 < high < 0.95
    assert rows == pair_rows(pairs, {0.0: base, 0.4: poorer})


@pytest.mark.parametrize(("hit", "ratio"), [(1.0, 1), (0.0, 0)])
def test_what_all_pairs_agree_on_is_not_certain(hit, ratio):
    pairs = pairs_of(*["x"] * 20)
    rows = pair_rows(pairs, {0.0: right(*[1.0] * 20), 0.4: right(*[hit] * 20)})
    assert rows[0.0]["interval"] == share_interval(20, 20) and rows[0.0]["ratio_interval"] == (1, 1)
    assert rows[0.4]["interval"] == share_interval(20 * ratio, 20)
    assert rows[0.4]["ratio"] == ratio and rows[0.4]["ratio_interval"] is None
    assert rows[0.4]["margin_ratio"] == 2 * ratio - 1
    assert rows[0.4]["margin_ratio_interval"] is None


def test_paired_ratios_are_narrower_than_accuracies():
    base = (torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.7).double()
    other = base.clone()
    other[:8] = 1 - other[:8]
    row = pair_rows(pairs_of(*["x"] * 400), {0.0: base, 0.4: other})[0.4]
    spread = {name: row[name][1] - row[name][0] for name in ("interval", "ratio_interval")}
    assert spread["ratio_interval"] < 0.5 * spread["interval"] / row["accuracy"]


def test_a_base_at_chance_has_no_margin_and_one_pair_no_interval():
    pairs = pairs_of(*["x"] * 20)
    rows = pair_rows(pairs, {0.0: right(*[1.0, 0.0] * 10), 0.4: right(*[1.0] * 20)})
    assert rows[0.4]["ratio"] == 2 and rows[0.4]["margin_ratio"] is None
    alone = pair_rows(pairs_of("x"), {0.4: right(1.0)})[0.4]
    assert alone["accuracy"] == 1 and alone["interval"] is None and alone["ratio"] is None
    # a paradigm of one pair: over all pairs then
    assert pair_rows(pairs_of("x", "y", "y"), {0.0: right(1.0, 0.0, 1.0)})[0.0]["interval"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object, found list"),
        (
            '{"sentence_good": "A."}',
            "line 2: expected a sentence in field 'sentence_bad', found on",
        ),
        ('{"sentence_good": "A.", "sentence_bad": 3}', "'sentence_bad', found 3"),
        ('{"sentence_good": " ", "sentence_bad": "B."}', "sentence in field 'sentence_good'"),
        ('{"sentence_good": "A.", "sentence_bad": "B.", "field": 3}', "expected text in field 'fi"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"sentence_good": "A.", "sentence_bad": "B."}\n' + line + "\n")
    with pytest.raises(FlexmoeError, match=r"pairs\.jsonl, ") as error:
        read_pairs(path, 1)
    assert message in str(error.value)


def test_files_that_are_none(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "pairs.csv").write_text("a,b\n")
    (tmp_path / "broken.jsonl.gz").write_bytes(gzip.compress(b"{}" * 99)[:-12])
    (tmp_path / "latin.jsonl").write_bytes(b'{"sentence_good": "\xe9"}')
    for name, message in (
        ("empty.jsonl", "is empty"),
        ("pairs.csv", "ending in .jsonl or .jsonl.gz"),
        ("broken.jsonl.gz", "cannot be read"),
        ("latin.jsonl", "cannot be read as UTF-8"),
        ("nowhere.jsonl", "does not exist"),
    ):
        with pytest.raises(FlexmoeError, match=message):
            read_pairs(tmp_path / name)
    with pytest.raises(FlexmoeError, match="at least 1, found 0"):
        read_pairs(tmp_path / "empty.jsonl", 0)


def test_sentences_beyond_the_context_are_named(tiny):
    model, tokenizer = tiny
    pairs = [Pair("word " * 2000, "He runs.", "", "", 17)]
    with pytest.raises(FlexmoeError, match=r"line 17 has a sentence of .* context is 1024"):
        encode(pairs, tokenizer, model.config)


def test_scores_that_are_no_numbers_are_not_taken_for_wrong(tiny, monkeypatch, caplog):
    model, tokenizer = tiny
    pairs = [Pair("He runs.", "He run.", "", "", 1), Pair("We run.", "We runs.", "", "", 2)]
    encoded = encode(pairs, tokenizer, model.config)
    scores = [torch.tensor([-1.0, -2.0, -3.0, bad]).double() for bad in (-4, math.nan, -math.inf)]
    given = iter(scores)
    monkeypatch.setattr("flexmoe.evaluation.pairs.sequence_scores", lambda *_: next(given))
    found = right_pairs({key: lambda: model for key in (0.0, 0.2, 0.4)}, encoded)
    assert [int(right_N.isnan().sum()) for right_N in found.values()] == [0, 1, 1]
    assert "log-probabilities of pairs are not finite" in caplog.text
    rows = pair_rows(pairs, found)
    assert rows[0.0]["accuracy"] == 0.5 and math.isnan(rows[0.4]["accuracy"])
    assert rows[0.4]["interval"] is None and rows[0.4]["ratio_interval"] is None
