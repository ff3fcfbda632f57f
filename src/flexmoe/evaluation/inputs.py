"""What members are measured on: text, minimal pairs, prompts and tasks, read and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import GenerationConfig

from flexmoe.data import (
    check_tokens,
    evaluation_windows,
    pick_batch_size,
    pick_seq_len,
    tokens_sha256,
)
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.compared import Compared
from flexmoe.evaluation.generate import end_tokens, greedy, sampled
from flexmoe.evaluation.pairs import Encoded, Pair, encode, read_pairs
from flexmoe.evaluation.prompts import Prompt, check_prompts, read_prompts, window_prompts
from flexmoe.evaluation.tasks import FILES, check_kept, load_tasks
from flexmoe.files import file_sha256

FROM_DATA = "data"  # in place of a prompts file: the beginnings of held-out windows
MAX_NEW_TOKENS = 256
SEED = 0  # of sampled answers


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure.

    ``data``: held-out text; ``pruned``: budgets of a family (None: all of its); ``samples``:
    windows a data file (None: all); ``seq_len``, ``batch_size``: None picks them; ``base``:
    weights for a plan alone; ``against``: another model to compare with, measured in the same run.
    ``pairs``: a file of minimal pairs (see `read_pairs`), of each paradigm the first
    ``pairs_per_paradigm``. ``tasks`` of lm-evaluation-harness, the first ``task_limit`` documents
    of each. ``generate``: a file of prompts (see `read_prompts`) or 'data', the first
    ``generate_limit`` of them; ``json_prompts``: a file of prompts to answer in JSON or by a tool
    call; ``max_new_tokens`` for both (None: 256). ``save``: keep the curve in the family's folder.
    ``min_recovery``: the share of the base's quality ``by`` loss, pairs or tasks to keep (None: no
    such gate). ``router``: the rule where whole experts go, in place of the family's own;
    ``policy``: a run-time policy (see `policies.parse`), fitted on ``policy_data`` (None: tiny).
    """

    data: str = "tiny"
    pruned: Sequence[float] | None = None
    samples: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    base: str | Path | None = None
    device: str = "auto"
    pairs: str | Path | None = None
    pairs_per_paradigm: int | None = None
    save: bool = False
    against: str | Path | None = None
    tasks: Sequence[str] = ()
    task_limit: int | None = None
    generate: str | Path | None = None
    generate_limit: int | None = None
    json_prompts: str | Path | None = None
    max_new_tokens: int | None = None
    min_recovery: float | None = None
    by: str = "loss"
    router: str | None = None
    policy: str | None = None
    policy_data: str | None = None

    def __post_init__(self) -> None:
        for value, option, needed, there in (
            (self.pairs_per_paradigm, "--pairs-per-paradigm", "--pairs FILE", self.pairs),
            (self.task_limit, "--task-limit", "--tasks", self.tasks or None),
            (self.generate_limit, "--generate-limit", "--generate", self.generate),
            (
                self.max_new_tokens,
                "--max-new-tokens",
                "--generate or --json-prompts",
                self.generate or self.json_prompts,
            ),
            (None if self.by == "loss" else self.by, "--by", "--min-recovery", self.min_recovery),
            (self.policy_data, "--policy-data", "--policy", self.policy),
        ):
            if value is not None and there is None:
                raise FlexmoeError(f"{option} has no effect without {needed}")
        if self.task_limit is not None and self.task_limit < 1:
            raise FlexmoeError(f"--task-limit must be at least 1, found {self.task_limit}")
        for value, option in ((self.router, "--router"), (self.policy, "--policy")):
            if value is not None and self.save:
                raise FlexmoeError(
                    f"--save keeps the curve of the family as it is, {option} changes it: leave "
                    "one of them out (--json keeps the results)"
                )
        if self.min_recovery is not None:
            if self.by == "pairs" and self.pairs is None:
                raise FlexmoeError("--by pairs needs --pairs FILE")
            if self.by == "tasks" and not self.tasks:
                raise FlexmoeError("--by tasks needs --tasks")


@dataclass(frozen=True)
class Inputs:
    """All of it. ``prompts`` and ``structured`` are empty, ``encoded`` None where not asked for;
    ``batch_size`` windows of ``seq_len`` tokens are a step; ``modes`` the settings of generation,
    ``ends`` the tokens that end an answer."""

    windows: dict[str, Tensor]
    seq_len: int
    batch_size: int
    pairs: list[Pair]
    encoded: Encoded | None
    prompts: list[Prompt]
    structured: list[Prompt]
    max_new_tokens: int
    modes: dict[str, dict[str, Any]]
    ends: list[int]
    tasks: list[Any]


def read_inputs(compared: Compared, config: EvaluateConfig) -> Inputs:
    """What ``config`` asks for, as tokens; `FlexmoeError` for what cannot be used."""
    tokenizer, settings = compared.tokenizer, compared.settings
    length = pick_seq_len(config.seq_len, settings)
    pairs = [] if config.pairs is None else read_pairs(config.pairs, config.pairs_per_paradigm)
    structured = [] if config.json_prompts is None else read_prompts(config.json_prompts, tokenizer)
    prompts: list[Prompt] = []
    if config.generate is not None and str(config.generate) != FROM_DATA:
        prompts = read_prompts(config.generate, tokenizer, config.generate_limit)
    windows = evaluation_windows(config.data, tokenizer, samples=config.samples, seq_len=length)
    for ids in windows.values():
        check_tokens(ids, settings)
    if str(config.generate) == FROM_DATA:
        prompts = window_prompts(windows, config.generate_limit)
    tasks = load_tasks(config.tasks) if config.tasks else []
    if config.by == "tasks":
        check_kept(tasks)
    most = MAX_NEW_TOKENS if config.max_new_tokens is None else config.max_new_tokens
    generation, ends = _generation_config(compared), []
    if asked := prompts + structured:
        check_prompts(asked, settings, most)
        ends = end_tokens(generation, tokenizer)
    return Inputs(
        windows=windows,
        seq_len=length,
        batch_size=pick_batch_size(config.batch_size, length),
        pairs=pairs,
        encoded=encode(pairs, tokenizer, settings) if pairs else None,
        prompts=prompts,
        structured=structured,
        max_new_tokens=most,
        modes={"greedy": greedy(), "sampled": sampled(generation)},
        ends=ends,
        tasks=tasks,
    )


def _generation_config(compared: Compared) -> GenerationConfig:
    if (compared.weights / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(compared.weights)
    return GenerationConfig.from_model_config(compared.settings)


def describe(inputs: Inputs, config: EvaluateConfig) -> dict[str, Any]:
    """Names, counts and hashes of all inputs, as `flexmoe.evaluation.records.Curve` has them."""
    files = describe_files(inputs.windows)
    found: dict[str, Any] = {
        "data": config.data, "files": files, "pairs": None, "tasks": None, "generation": None,
        "structured": None,
    }  # fmt: skip
    if config.pairs is not None:
        found["pairs"] = describe_pairs(config.pairs, config.pairs_per_paradigm)
    if config.tasks:
        own = {Path(n).name: file_sha256(n) for n in config.tasks if n.endswith(FILES)}
        names = [Path(n).name if n.endswith(FILES) else n for n in config.tasks]
        found["tasks"] = {"names": names, "limit": config.task_limit, "files": own}
    if config.generate is not None:
        found["generation"] = _prompts(config.generate, inputs, inputs.prompts, inputs.modes)
    if config.json_prompts is not None:
        modes = {"greedy": inputs.modes["greedy"]}
        found["structured"] = _prompts(config.json_prompts, inputs, inputs.structured, modes)
    return found


def describe_files(windows: Mapping[str, Tensor]) -> dict[str, Any]:
    """Of each data file the windows, tokens a window, and hash of the tokens."""
    return {
        name: {"windows": len(ids), "seq_len": ids.shape[1], "sha256": tokens_sha256(ids)}
        for name, ids in windows.items()
    }


def describe_pairs(path: str | Path, per_paradigm: int | None) -> dict[str, Any]:
    """The file of pairs, and how many of each paradigm were used."""
    return {"name": Path(path).name, "sha256": file_sha256(path), "per_paradigm": per_paradigm}


def _prompts(
    asked: str | Path, inputs: Inputs, prompts: list[Prompt], modes: dict[str, Any]
) -> dict[str, Any]:
    held_out = str(asked) == FROM_DATA
    return {
        "name": FROM_DATA if held_out else Path(asked).name,
        "sha256": None if held_out else file_sha256(asked),
        "n": len(prompts),
        "max_new_tokens": inputs.max_new_tokens,
        "settings": modes,
        "seed": SEED,
    }
