"""Generation health: how many answers loop, and how many never end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexmoe.evaluation.generate import Answer
from flexmoe.evaluation.intervals import share_interval
from flexmoe.evaluation.prompts import Prompt

# As in The Curious Case of Neural Text Degeneration (Holtzman et al., 2020, arXiv 1904.09751,
# figure 9): a phrase of at least two tokens stands at least three times at the end.
PHRASE, TIMES = 2, 3
EXAMPLES = 3


def loops(ids: Sequence[int]) -> bool:
    """Whether the tokens end in a phrase of at least two that stands there at least three times
    in a row."""
    ids = list(ids)
    return any(
        ids[-n * (TIMES - 1) :] == ids[-n * TIMES : -n]
        for n in range(PHRASE, len(ids) // TIMES + 1)
    )


def share(hits: int, n: int) -> dict[str, Any]:
    """``n``, the ``share`` of them and its 95 % ``interval``."""
    return {"n": n, "share": hits / n, "interval": share_interval(hits, n)}


def health_row(prompts: Sequence[Prompt], found: Sequence[Answer], tokenizer: Any) -> dict:
    """Shares (see `share`) of the answers that are ``looped``, ``endless`` (no end token within
    what was allowed) and ``either``; ``tokens``, the mean length of an answer; the first few as
    ``examples``."""
    looped, endless = [loops(a.ids) for a in found], [not a.ended for a in found]
    n = len(found)
    return {
        "looped": share(sum(looped), n),
        "endless": share(sum(endless), n),
        "either": share(sum(a or b for a, b in zip(looped, endless, strict=True)), n),
        "tokens": sum(len(a.ids) for a in found) / n,
        "examples": [
            {"prompt": tokenizer.decode(p.ids), "answer": tokenizer.decode(a.ids)}
            for p, a in zip(prompts[:EXAMPLES], found[:EXAMPLES], strict=True)
        ],
    }
