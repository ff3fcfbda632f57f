"""Answers to prompts: batches, loops, ends, JSON and tool calls."""

import json

import pytest
import torch

import flexmoe
from flexmoe.data import TINY, load_tokenizer
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.generate import Answer, answers, end_tokens, greedy, sampled
from flexmoe.evaluation.health import health_row, loops
from flexmoe.evaluation.prompts import Prompt, check_prompts, read_prompts, window_prompts
from flexmoe.evaluation.structured import calls_tool, is_json, structured_row

TEXTS = ("The captain", "1 + 1 =", "def add(a, b):\n    return", "It was a dark and stormy night")
CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}A:"  # noqa: E501
SCHEMA = {"type": "object", "properties": {"city": {}, "day": {}}, "required": ["city"]}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}


@pytest.fixture(scope="module")
def tiny():
    model = flexmoe.load("tiny", dtype=torch.float32, device="cpu")
    return model, load_tokenizer(TINY / "model", model.config)


def prompts_of(tokenizer, texts=TEXTS):
    return [Prompt(tokenizer(text)["input_ids"]) for text in texts]


def alone(model, ids, new):
    """Greedy tokens by whole forward passes, one prompt, no cache, no padding."""
    ids = list(ids)
    for _ in range(new):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[-new:]


def test_batches_padded_on_the_left_answer_as_each_prompt_alone(tiny):
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer)
    assert len({len(prompt.ids) for prompt in prompts}) > 2
    wanted = [alone(model, prompt.ids, 10) for prompt in prompts]
    for rows in (3, 32):
        found = answers({0.0: lambda: model}, prompts, greedy(), [0], max_new_tokens=10, rows=rows)[
            0.0
        ]
        assert [answer.ids for answer in found] == wanted
        assert not any(answer.ended for answer in found)


def test_an_answer_stops_before_its_end_token(tiny):
    model, tokenizer = tiny
    prompts = prompts_of(tokenizer)
    whole = alone(model, prompts[0].ids, 8)
    end = whole[5]
    (found,) = answers({0.0: lambda: model}, prompts[:1], greedy(), [end], max_new_tokens=8)[0.0]
    assert found == Answer(whole[: whole.index(end)], True)


def test_sampling_repeats_by_its_seed_and_is_the_same_for_all_members(tiny):
    model, tokenizer = tiny
    prompts, settings = prompts_of(tokenizer), sampled(model.generation_config)
    assert settings["temperature"] == 1.0 and settings["top_k"] == 0
    members = {0.0: lambda: model, 0.4: lambda: model}
    before = torch.random.get_rng_state()
    found = answers(members, prompts, settings, [0], max_new_tokens=8)
    other = answers(members, prompts, settings, [0], max_new_tokens=8, seed=1)
    assert found[0.0] == found[0.4] != other[0.0]
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("ids", "looped"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], False),
        ([9, 9, 1, 2, 1, 2, 1, 2], True),
        ([9, 9, 9, 1, 2, 1, 2], False),  # twice only
        ([1, 2, 1, 2, 1, 2, 9], False),  # not at the end
        ([5, 5, 5, 5, 5, 5], True),
        ([5, 5, 5, 5, 5], False),  # two tokens, twice and a half
        ([7, *[1, 2, 3, 4, 5] * 3], True),
        ([7, *[1, 2, 3, 4, 5] * 3, 1, 2], True),  # cut off within the phrase
        ([], False),
    ],
)
def test_loops(ids, looped):
    assert loops(ids) is looped


def test_health_counts_loops_and_answers_without_end(tiny):
    _, tokenizer = tiny
    found = [Answer([5] * 9, False), Answer([1, 2], True), Answer([5] * 9, True), Answer([3], True)]
    row = health_row(prompts_of(tokenizer), found, tokenizer)
    assert [row[name]["share"] for name in ("looped", "endless", "either")] == [0.5, 0.25, 0.5]
    low, high = row["endless"]["interval"]
    assert row["endless"]["n"] == 4 and 0 < low < 0.25 < high < 0.75
    assert row["tokens"] == 21 / 4 and row["examples"][0]["prompt"] == TEXTS[0]


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('{"a": 1}', True),
        ("  [1, 2]\n", True),
        ('```json\n{"a": 1}\n```', True),
        ('Sure! {"a": 1}', False),
        ('{"a": 1', False),
        ("42", False),
        ("", False),
        ("[" * 100_000, False),
    ],
)
def test_json_answers(text, good):
    assert is_json(text) is good


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', True),
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Oslo", "day": 1}}]', True),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', True),
        ('{"name": "weather", "arguments": "{\\"city\\": \\"Oslo\\"}"}', True),
        ('{"name": "weather", "arguments": {"day": 1}}', False),  # city is required
        ('{"name": "whether", "arguments": {"city": "Oslo"}}', False),
        ('{"name": "weather"}', False),
        ('{"name": "weather", "arguments": "{"}', False),
        ('{"name": "weather", "arguments": {"city": "Oslo"}', False),  # cut off
        ('{"name": "weather", "arguments": {"city": 1}} {"name": "x", "arguments": {}}', False),
        ("It is sunny {today}.", False),
        ("{" * 10_000, False),
    ],
)
def test_tool_calls(text, good):
    assert calls_tool(text, {"weather": SCHEMA}) is good


def test_structured_answers_are_counted_by_kind(tiny):
    _, tokenizer = tiny

    def answer(text, ended=True):
        return Answer(tokenizer(text)["input_ids"], ended)

    call = '{"name": "weather", "arguments": {"city": "Oslo"}}'
    plain, tools = Prompt([1]), Prompt([1], {"weather": SCHEMA})
    found = [answer("[]"), answer("[]", False), answer("no"), answer(call), answer("[]")]
    row = structured_row([plain, plain, plain, tools, tools], found, tokenizer)
    assert (row["valid"]["n"], row["valid"]["share"]) == (5, 2 / 5)
    assert (row["text"]["n"], row["text"]["share"]) == (3, 1 / 3)
    assert (row["tools"]["n"], row["tools"]["share"]) == (2, 1 / 2)
    assert structured_row([plain], found[:1], tokenizer)["tools"] is None


def write(path, *lines):
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    )
    return path


def test_prompts_are_text_or_chats_with_tools(tiny, tmp_path):
    tokenizer = load_tokenizer(TINY / "model", tiny[0].config)
    tokenizer.chat_template = CHAT
    chat = [{"role": "user", "content": "Is it cold?"}]
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "The captain"},
        {"messages": chat},
        {"messages": chat, "tools": [TOOL]},
    )
    text, chatted, with_tools = read_prompts(path, tokenizer)
    assert tokenizer.decode(text.ids) == "The captain" and not text.tools
    assert tokenizer.decode(chatted.ids) == "user: Is it cold?\nA:"
    assert '"weather"' in tokenizer.decode(with_tools.ids)
    assert with_tools.tools == {"weather": SCHEMA}
    assert read_prompts(path, tokenizer, 1) == [text]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, r"line 2: expected prompt .*found \['text'\]"),
        ({"prompt": "a", "tools": [TOOL]}, "line 2: expected prompt"),
        ({"prompt": ""}, "line 2: expected prompt"),
        ({"messages": []}, "line 2: expected prompt"),
        ({"messages": [{"role": "user", "content": "a"}]}, "has no chat template"),
        ({"messages": [{}], "tools": [{"name": "f"}]}, "expected tools as a list"),
        ({"messages": [{}], "tools": {"name": "f"}}, "expected tools as a list"),
        *(
            (
                {"messages": [{}], "tools": [{"function": {"name": "f", "parameters": schema}}]},
                f"line 2: tool 'f' has {found} as required",
            )
            for schema, found in (
                ({"required": None}, "None"),
                ({"required": "city"}, "city"),
                ({"required": [["city"]]}, r"\[\['city'\]\]"),
            )
        ),
        ("{", "line 2: not valid JSON"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tiny, tmp_path, line, message):
    path = write(tmp_path / "p.jsonl", {"prompt": "a"}, line)
    with pytest.raises(FlexmoeError, match=message):
        read_prompts(path, tiny[1])


def test_a_chat_that_its_template_refuses(tiny, tmp_path):
    tokenizer = load_tokenizer(TINY / "model", tiny[0].config)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = write(tmp_path / "p.jsonl", {"messages": [{"role": "user", "content": "a"}]})
    with pytest.raises(FlexmoeError, match=r"line 1: the chat template refuses .*alternate"):
        read_prompts(path, tokenizer)


def test_prompts_from_windows_come_from_all_files():
    windows = {"a": torch.arange(60).view(3, 20), "b": 100 + torch.arange(40).view(2, 20)}
    found = window_prompts(windows)
    assert [prompt.ids[0] for prompt in found] == [0, 100, 20, 120, 40]
    assert all(len(prompt.ids) == 10 for prompt in found)
    assert len(window_prompts(windows, 3)) == 3


def test_prompts_beyond_the_context_or_the_vocabulary(tiny):
    config = tiny[0].config
    check_prompts([Prompt([1] * 24)], config, 1000)
    for prompt, new, message in (
        (Prompt([1] * 25), 1000, "has 25 tokens and 1000 may follow, the model's context is 1024"),
        (Prompt([4096]), 1, "token 4096, the model knows 4096"),
        (Prompt([1]), 0, "at least 1, found 0"),
    ):
        with pytest.raises(FlexmoeError, match=message):
            check_prompts([prompt], config, new)


def test_ends_are_those_of_the_checkpoint(tiny):
    model, tokenizer = tiny
    assert end_tokens(model.generation_config, tokenizer) == [0]
    config = type(model.generation_config)(eos_token_id=[3, 4])
    assert end_tokens(config, tokenizer) == [3, 4]
    with pytest.raises(FlexmoeError, match="names no end token"):
        end_tokens(type(config)(), type("Tokenizer", (), {"eos_token_id": None}))
