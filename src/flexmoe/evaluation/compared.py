"""Which models one evaluation compares, from paths: nothing is loaded here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.data import calibration_windows, check_tokens, load_tokenizer, pick_seq_len
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.members import BASE, How, Key, Members, Shelf, fit_together
from flexmoe.family import SPREAD, find_folder, find_weights, input_device, load
from flexmoe.headers import EXPORT_NAME, read_json
from flexmoe.plan import JSON_NAME, Plan
from flexmoe.policies import Fitted, Policy, parse
from flexmoe.routing.rules import check_rule

MODEL = "model"
POLICY_TOKENS = 4096  # that a policy looks at


@dataclass(frozen=True)
class Compared:
    """``members`` by key, the base first; ``base`` is the key that the others are compared with,
    None where there is nothing to compare. ``budgets`` are the keys that are no other model;
    ``folder`` is where they are from, ``weights`` where their weights lie, ``against`` that of the
    base if it is another model, or the same one without the policy. Those that do not fit in memory
    ``together`` are loaded in turn. ``hows`` say what the router does in each of the budgets."""

    members: Members
    base: Key | None
    budgets: tuple[float, ...]
    plan: Plan | None
    folder: Path
    weights: Path
    against: Path | None
    together: bool
    shelf: Shelf
    tokenizer: Any
    settings: PreTrainedConfig
    device: torch.device
    hows: dict[Key, How] = field(default_factory=dict)

    def figures(self, key: Key) -> dict[str, Any]:
        """Sizes of a member; those of one that is not of a family once it was loaded."""
        if key != BASE and self.plan is not None:
            pruned, rule = float(key), self.hows[key].rule
            return self.plan.figures(pruned, self.plan.widths(pruned), rule).model_dump()
        name, weights = (BASE, self.against) if key == BASE else (MODEL, self.weights)
        assert weights is not None
        if name not in self.shelf.loaders:  # the same model without the policy
            name = MODEL
        share = {} if key == BASE else {"pruned": key}
        sizes = {"routed_parameters": self.shelf.routed[name], "bytes": Checkpoint(weights).bytes}
        return share | sizes


def compare(
    path: str | Path,
    pruned: Sequence[float] | None = None,
    *,
    base: str | Path | None = None,
    against: str | Path | None = None,
    with_base: bool = False,
    device: str = "auto",
    router: str | None = None,
    policy: str | None = None,
    policy_data: str | None = None,
) -> Compared:
    """The budgets ``pruned`` (None: all) of a family or plan (``base`` has the weights of a plan
    alone), or the one member that an export or checkpoint is; compared with the model ``against``
    or else with budget 0, if it is among them or ``with_base`` asks for it; under a ``policy``,
    fitted on ``policy_data``, with the same model without. ``router`` is the rule where whole
    experts go, in place of the plan's.

    Raises `FlexmoeError` for what does not fit together. On the CPU arithmetic is float32
    whatever the checkpoint's dtype: as fast there, and differences are not lost in rounding.
    """
    folder, place = find_folder(path), input_device(device)
    plan = Plan.load(folder) if (folder / JSON_NAME).is_file() else None
    if router is not None:
        _check_router(path, plan, router)
    asked_policy = None if policy is None else parse(policy)
    if asked_policy is not None and plan is not None:
        _check_policy(asked_policy[0], router or plan.recipe.router)
    with_full = with_base and against is None and policy is None
    budgets = _budgets(path, folder, plan, pruned, with_full)
    weights = find_weights(path, base)
    settings = meta_model(weights).config
    tokenizer = load_tokenizer(weights, settings)
    dtype = torch.float32 if place.type == "cpu" else "auto"
    first = pruned[0] if pruned and plan is None else None
    loaders = {MODEL: partial(load, path, first, base=base, device=device, dtype=dtype)}
    other = None
    if against is not None:
        other = find_weights(against)
        _check_same_tokens(other, against, settings, tokenizer)
        loaders[BASE] = partial(load, against, device=device, dtype=dtype)
    elif with_base and plan is None and policy is None:
        raise FlexmoeError(
            f"'{path}' is one member and there is nothing to compare it with: give the model it is "
            "from with --against"
        )
    together = other is None or (device != SPREAD and fit_together((weights, other), device))
    shelf = Shelf(loaders, together=together)
    members: dict[Key, Any] = {BASE: shelf.member(BASE)} if other is not None else {}
    fitted = None
    if asked_policy is not None:
        fitted = Fitted(*asked_policy, _policy_tokens(policy_data, tokenizer, settings))
        if other is None:
            members[BASE] = shelf.budget(MODEL, None if plan is None else 0.0, How())
            other = weights
    hows: dict[Key, How] = {share: How(router, fitted) for share in budgets}
    for share in budgets:
        switches = plan is not None or fitted is not None
        at = None if plan is None else share
        members[share] = shelf.budget(MODEL, at, hows[share]) if switches else shelf.member(MODEL)
    own = 0.0 if plan is not None and 0.0 in budgets else None
    return Compared(
        members, own if other is None else BASE, budgets, plan, folder, weights, other, together,
        shelf, tokenizer, settings, place, hows,
    )  # fmt: skip


def _check_router(path: str | Path, plan: Plan | None, router: str) -> None:
    if plan is None:
        raise FlexmoeError(f"'{path}' is one member: --router has no effect on it, leave it out")
    check_rule(router, plan.recipe.unit, bool(plan.constant))
    if router == "keep" and plan.recipe.unit != "expert":
        raise FlexmoeError("--router has no effect: the plan removes no whole experts")


def _check_policy(policy: Policy, rule: str) -> None:
    if policy.other is not None and rule == "remove":
        raise FlexmoeError(
            f"policy '{policy.name}' with a second number reads what the router says of all "
            "experts, and --router remove takes experts out of it: give one number, or --router "
            "keep"
        )


def _policy_tokens(data: str | None, tokenizer: Any, settings: PreTrainedConfig) -> Tensor:
    """What a policy is fitted on: some windows of calibration text."""
    length = min(POLICY_TOKENS, pick_seq_len(None, settings))
    data = "tiny" if data is None else data
    samples = POLICY_TOKENS // length
    windows = calibration_windows(data, tokenizer, samples=samples, seq_len=length, seed=0)
    return check_tokens(windows.ids, settings)


def _budgets(
    path: str | Path,
    folder: Path,
    plan: Plan | None,
    asked: Sequence[float] | None,
    with_full: bool,
) -> tuple[float, ...]:
    """The budgets to measure, rich to poor; of a model that is one member the share it was exported
    at."""
    if plan is None:
        if asked is not None and len(asked) != 1:
            raise FlexmoeError(
                f"'{path}' is one member: --pruned has no effect on it, leave it out"
            )
        return (exported_share(folder),)
    shares = set(plan.budgets if asked is None else asked)
    budgets = tuple(sorted(shares | {0.0} if with_full else shares))
    for share in budgets:
        plan.widths(share)  # refuse a share out of reach before the slow part
    return budgets


def exported_share(folder: Path) -> float:
    """The share an export was asked for, what it came to where one width cannot be as exact, and 0
    of what is no export."""
    if not (folder / EXPORT_NAME).is_file():
        return 0.0
    about = read_json(folder / EXPORT_NAME)
    share = about.get("achieved" if about.get("layout") == "uniform" else "pruned")
    if not isinstance(share, float | int):
        raise FlexmoeError(f"{folder / EXPORT_NAME} does not say what was pruned: export again")
    return share


def _check_same_tokens(
    other: Path, against: str | Path, settings: PreTrainedConfig, tokenizer: Any
) -> None:
    theirs = meta_model(other).config
    sizes = [config.get_text_config().vocab_size for config in (settings, theirs)]
    if sizes[0] != sizes[1] or load_tokenizer(other, theirs).get_vocab() != tokenizer.get_vocab():
        raise FlexmoeError(
            f"'{against}' has another vocabulary ({sizes[1]} tokens) than the model ({sizes[0]}): "
            "their predictions cannot be compared. Give the model it was made from"
        )
