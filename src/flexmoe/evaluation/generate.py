"""Answers of every member to the same prompts, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig

from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.members import Key, Members
from flexmoe.evaluation.prompts import Prompt
from flexmoe.progress import Track, silent

ROWS = 32  # prompts at a time


@dataclass(frozen=True)
class Answer:
    """New tokens without the end token, and whether that came within the tokens allowed."""

    ids: list[int]
    ended: bool


def greedy() -> dict[str, Any]:
    """Settings of the most likely token every time, and nothing against repetition."""
    return {"do_sample": False, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}


def sampled(config: GenerationConfig) -> dict[str, Any]:
    """Settings of sampling as the checkpoint's generation_config.json recommends it; where it is
    silent, from the whole distribution as it is."""
    neutral = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": None, "repetition_penalty": 1}
    asked = {name: getattr(config, name, None) for name in neutral}
    return {"do_sample": True} | {
        name: value if asked[name] is None else asked[name] for name, value in neutral.items()
    }


def end_tokens(config: GenerationConfig, tokenizer: Any) -> list[int]:
    """The tokens that end an answer; a `FlexmoeError` where the checkpoint names none."""
    found = config.eos_token_id if config.eos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise FlexmoeError(
            "the checkpoint names no end token, so no answer could end: set eos_token_id in "
            "generation_config.json"
        )
    return found if isinstance(found, list) else [found]


def answers(
    members: Members,
    prompts: Sequence[Prompt],
    settings: dict[str, Any],
    ends: Sequence[int],
    *,
    max_new_tokens: int,
    rows: int = ROWS,
    seed: int = 0,
    what: str = "generate",
    track: Track = silent,
) -> dict[Key, list[Answer]]:
    """The answer to each prompt by member, ``rows`` prompts at a time, padded on the left.

    ``settings`` are of transformers' generation; with sampling every member starts from ``seed``.
    Prompts of like length go together: the same batches for all members.
    """
    order = sorted(range(len(prompts)), key=lambda n: -len(prompts[n].ids))
    batches = [order[start : start + rows] for start in range(0, len(order), rows)]
    found: dict[Key, dict[int, Answer]] = {key: {} for key in members}
    model: Any = None
    with torch.random.fork_rng():
        for key, batch in track([(key, batch) for key in members for batch in batches], what):
            if not found[key]:
                model = None  # or it could not go before the next one comes
                model = members[key]()
                torch.manual_seed(seed)
            given = [prompts[n].ids for n in batch]
            new = _answers(model, given, settings, ends, max_new_tokens)
            found[key] |= dict(zip(batch, new, strict=True))
    return {key: [of[n] for n in range(len(prompts))] for key, of in found.items()}


def _answers(
    model: Any, given: list[list[int]], settings: dict[str, Any], ends: Sequence[int], most: int
) -> list[Answer]:
    length = max(map(len, given))
    padded = [[ends[0]] * (length - len(ids)) + ids for ids in given]
    real = [[0] * (length - len(ids)) + [1] * len(ids) for ids in given]
    config = GenerationConfig(
        **settings, max_new_tokens=most, eos_token_id=list(ends), pad_token_id=ends[0]
    )
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor(padded, device=model.device),
            attention_mask=torch.tensor(real, device=model.device),
            generation_config=config,
        )
    return [_answer(ids, ends) for ids in out[:, length:].tolist()]


def _answer(ids: list[int], ends: Sequence[int]) -> Answer:
    stop = next((at for at, token in enumerate(ids) if token in ends), None)
    return Answer(ids[:stop], stop is not None)
