"""Evaluation: every budget on held-out text, minimal pairs, tasks and prompts, beside its base."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.compared import Compared, compare
from flexmoe.evaluation.curve import about, check_can_save, make_curve, of_weights, save_curve
from flexmoe.evaluation.generate import ROWS, answers
from flexmoe.evaluation.health import health_row
from flexmoe.evaluation.inputs import SEED, EvaluateConfig, Inputs, describe, read_inputs
from flexmoe.evaluation.losses import DISTANCES, Losses, loss_rows, window_losses
from flexmoe.evaluation.members import BASE, Key, Members, budgets_of
from flexmoe.evaluation.pairs import pair_rows, right_pairs
from flexmoe.evaluation.quality import Verdict, check_gate, gate
from flexmoe.evaluation.structured import structured_row
from flexmoe.evaluation.tasks import run_tasks, task_rows
from flexmoe.files import free_disk
from flexmoe.progress import Track, silent
from flexmoe.reports.card import refresh_card
from flexmoe.reports.report import size

Row = dict[str, Any]


def evaluate(
    model: nn.Module, windows: Mapping[str, Tensor], *, batch_size: int = 8, track: Track = silent
) -> dict[str, Row]:
    """Loss of ``model`` as it is on windows [n, t] by name: ``tokens`` (predicted ones), ``nll``
    (nats a token) and ``perplexity`` of each."""
    members: Members = {0.0: lambda: model}
    losses = window_losses(members, windows, batch_size=batch_size, track=track)
    return {name: _row(losses[0.0][name], ids) for name, ids in windows.items()}


def budget_rows(
    model: PreTrainedModel,
    windows: Mapping[str, Tensor],
    budgets: Sequence[float],
    track: Track = silent,
) -> list[Row]:
    """A row for every budget of a model that switches (see `flexmoe.load`): its figures, and the
    ``nll`` (see `mean_nll`) and ``perplexity`` that it comes to."""
    losses = window_losses(budgets_of(model, budgets), windows, track=track)
    rows = []
    for pruned in budgets:
        nll = mean_nll({name: _row(losses[pruned][name], ids) for name, ids in windows.items()})
        figures = model.flexmoe_plan.member(pruned).model_dump()
        rows.append({**figures, "nll": nll, "perplexity": perplexity(nll)})
    return rows


def _row(window_NM: Tensor, ids: Tensor) -> Row:
    nll = float(window_NM[:, 0].mean())
    return {"tokens": ids[:, 1:].numel(), "nll": nll, "perplexity": perplexity(nll)}


def perplexity(nll: float) -> float:
    """exp of a loss in nats; infinite where a float ends."""
    return math.exp(nll) if nll < 700 else math.inf


def mean_nll(results: Mapping[str, Mapping[str, float]]) -> float:
    """Mean over data files (each counts the same) of the loss a token."""
    return sum(row["nll"] for row in results.values()) / len(results)


@dataclass(frozen=True)
class Measured:
    """What one run measured.

    ``rows``: a row a budget and data file. ``members``: a row a budget with its figures, what
    `loss_rows` gives, and under ``pairs``, ``tasks``, ``generation`` (by mode) and ``structured``
    what `pair_rows`, `task_rows`, `health_row` and `structured_row` give, None where it was not
    asked for; ``work`` where routers leave something out, see `members.How`. ``against``: the
    same of the base, where that is another model. ``about``: inputs
    with their hashes, hardware, versions, date. ``saved``: the file that holds the curve (None:
    ``unsaved`` says why it could not be written), and ``verdict`` that of the gate, if they were
    asked for.
    """

    rows: list[Row]
    members: list[Row]
    against: Row | None
    about: Row
    saved: Path | None = None
    unsaved: str | None = None
    verdict: Verdict | None = None


def measure(
    path: str | Path,
    config: EvaluateConfig | None = None,
    *,
    command: str | None = None,
    track: Track = silent,
) -> Measured:
    """Evaluate a family, plan, export or plain checkpoint on all that ``config`` asks for.

    All members are measured on the same inputs in the same run as what they are compared with:
    the model ``config.against``, or budget 0 where it is among them (with ``save`` or
    ``min_recovery`` it always is). What cannot work is refused with a `FlexmoeError` before a
    model loads. ``command`` is kept with the results.
    """
    config = config or EvaluateConfig()
    if config.save:
        check_can_save(path)
    if config.min_recovery is not None:
        check_gate(config.min_recovery, config.by)
    compared = compare(
        path,
        config.pruned,
        base=config.base,
        against=config.against,
        with_base=config.save or config.min_recovery is not None,
        device=config.device,
        router=config.router,
        policy=config.policy,
        policy_data=config.policy_data,
    )
    inputs = read_inputs(compared, config)
    made_of = of_weights(compared.folder, track) if config.save else None
    losses = _losses(compared, inputs, track)
    found = {
        key: {**compared.figures(key), **row}
        for key, row in loss_rows(losses, compared.base).items()
    }
    for key, how in compared.hows.items():
        if (share := how.share) is not None:
            found[key]["work"] = share
    for name, of in _others(compared, inputs, config, track).items():
        for key in found:
            found[key][name] = of.get(key)
    members = [found[pruned] for pruned in compared.budgets]
    name = "no policy" if config.against is None else str(config.against)
    against = None if BASE not in found else _base_row(name, found[BASE])
    facts = about(compared, describe(inputs, config), command)
    facts |= {k: v for k in ("router", "policy") if (v := getattr(config, k)) is not None}
    saved = unsaved = None
    if made_of is not None:
        try:
            curve = make_curve(made_of, facts, members, against)
            saved = save_curve(compared.folder, curve)
            refresh_card(compared.folder, curve)
        except FlexmoeError as error:  # what was measured is not lost for that
            unsaved = str(error)
    verdict = None
    if config.min_recovery is not None:
        verdict = gate(members, config.min_recovery, config.by)
    return Measured(
        rows=_file_rows(losses, inputs, members),
        members=members,
        against=against,
        about=facts,
        saved=saved,
        unsaved=unsaved,
        verdict=verdict,
    )


def _losses(compared: Compared, inputs: Inputs, track: Track) -> Losses:
    with _room_for_logits(compared, inputs) as folder:
        return window_losses(
            compared.members,
            inputs.windows,
            compared.base,
            batch_size=inputs.batch_size,
            folder=folder,
            track=track,
        )


@contextmanager
def _room_for_logits(compared: Compared, inputs: Inputs) -> Iterator[Path | None]:
    """A temporary folder for the base's logits where the models are loaded in turn."""
    if compared.together:
        yield None
        return
    tokens = sum(ids[:, 1:].numel() for ids in inputs.windows.values())
    itemsize = 4 if compared.device.type == "cpu" else 2
    need = tokens * compared.settings.get_text_config().vocab_size * itemsize
    with tempfile.TemporaryDirectory(prefix="flexmoe-logits-") as folder:
        free = free_disk(folder)
        if need > free:
            raise FlexmoeError(
                f"the models do not fit in memory together, and the base's predictions take "
                f"{size(need)} on the disk of {Path(folder).parent}, which has {size(free)}: use "
                "fewer --samples, or a larger disk (TMPDIR)"
            )
        yield Path(folder)


def _others(
    compared: Compared, inputs: Inputs, config: EvaluateConfig, track: Track
) -> dict[str, dict[Key, Any]]:
    """All but the losses, by what it is and by member; empty where it was not asked for."""
    members, tokenizer = compared.members, compared.tokenizer
    found: dict[str, dict[Key, Any]] = {
        "pairs": {}, "tasks": {}, "generation": {}, "structured": {}
    }  # fmt: skip
    if inputs.encoded is not None:
        step = inputs.batch_size * inputs.seq_len  # what fits for text fits for pairs
        right = right_pairs(members, inputs.encoded, tokens_per_step=step, track=track)
        found["pairs"] = dict(pair_rows(inputs.pairs, right, compared.base))
    if inputs.tasks:
        results = run_tasks(
            members,
            inputs.tasks,
            tokenizer,
            limit=config.task_limit,
            batch_size=inputs.batch_size,
        )
        found["tasks"] = dict(task_rows(results, compared.base))
    how: dict[str, Any] = {
        "max_new_tokens": inputs.max_new_tokens,
        "rows": config.batch_size or ROWS,
        "seed": SEED,
        "track": track,
    }
    if inputs.prompts:
        found["generation"] = {key: {} for key in members}
        for mode, settings in inputs.modes.items():
            new = answers(members, inputs.prompts, settings, inputs.ends, what=mode, **how)
            for key, given in new.items():
                found["generation"][key][mode] = health_row(inputs.prompts, given, tokenizer)
    if inputs.structured:
        settings = inputs.modes["greedy"]
        new = answers(members, inputs.structured, settings, inputs.ends, what="json", **how)
        for key, given in new.items():
            found["structured"][key] = structured_row(inputs.structured, given, tokenizer)
    return found


def _base_row(name: str, row: Row) -> Row:
    """That of a base that is another model: without its distance to itself."""
    own = {key: value for key, value in row.items() if key.split("_")[0] not in DISTANCES}
    return {"model": name, **own}


def _file_rows(losses: Losses, inputs: Inputs, members: Sequence[Row]) -> list[Row]:
    return [
        {
            "pruned": of["pruned"],
            "data": name,
            **_row(losses[of["pruned"]][name], ids),
            "routed_parameters": of["routed_parameters"],
            "bytes": of["bytes"],
            **of["by_file"][name],
        }
        for of in members
        for name, ids in inputs.windows.items()
    ]
