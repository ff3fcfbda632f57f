"""Run-time policies: fewer experts for some tokens, without new weights.

A policy is one decorated pure function, a file each: what the router said of a batch and what is
known of the layer in, what to compute out. It is on for a model by name, ``NAME[:NUMBER]``; some
take two numbers, ``NAME:NUMBER/NUMBER``.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexmoe.around import Around, Reads, around_experts
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import ExpertLayer, Seen, expert_layers, experts_function, unchanged
from flexmoe.routing.edits import Edit, Routed, choose_function
from flexmoe.routing.rules import restore

# Routing weights of a token that always come to the same sum are normalised. Rounded to bfloat16
# they do so but for 4e-3.
EVEN = 1e-2


@dataclass
class Batch:
    """The batch that runs now: ``sequences`` of the same length, padding included; ``real_T`` says
    which of all tokens are no padding (None: all of them)."""

    sequences: int = 1
    real_T: Tensor | None = None


@dataclass(frozen=True)
class LayerFacts:
    """What a policy knows of a layer: its experts, the routing weights [N, K] of calibration
    tokens, largest first, and the batch that runs now; the second number that was given, if any,
    and then what the router says of all experts."""

    layer: ExpertLayer
    weight_NK: Tensor
    batch: Batch
    second: float | None = None
    around: Around | None = None

    @property
    def K(self) -> int:
        """Experts that a token is sent to."""
        return self.weight_NK.shape[1]

    @property
    def renormalises(self) -> bool:
        """Whether the router makes the weights of a token's experts come to the same sum."""
        total_N = self.weight_NK.sum(1)
        return bool((total_N - total_N.mean()).abs().max() < EVEN * total_N.mean())

    def keep(self, routed: Routed, keep_TK: Tensor) -> Routed:
        """Only these pairs; where the router normalises, their weights come to the same sum as
        all did."""
        weight_TK = routed.weight_TK
        if self.renormalises:
            kept_TK = weight_TK.float() * keep_TK  # in float16 sums over next to nothing overflow
            total_T1 = weight_TK.float().sum(1, keepdim=True)
            kept_TK *= total_T1 / kept_TK.sum(1, keepdim=True).clamp_min(1e-20)
            weight_TK = kept_TK.to(weight_TK.dtype)
        return Routed(routed.index_TK, weight_TK, routed.E).without(~keep_TK)


def places(weight_TK: Tensor) -> Tensor:
    """The place of each pair among those of its token, 0 the one with the largest weight."""
    return weight_TK.argsort(dim=1, descending=True, stable=True).argsort(dim=1)


Rule = Callable[[Routed, LayerFacts, float], Routed]
# From what is known of all layers and the number that was given to the number of each layer.
Fit = Callable[[Sequence[LayerFacts], float], list[float]]


@dataclass(frozen=True)
class Policy:
    """``rule`` is the function, ``argument`` what its number means, from ``least`` to ``most``
    (both exclusive, None: the experts of a token), and ``default`` its value (None: must be
    given). ``fit`` gives every layer a number of its own. ``second`` is what a second number means,
    None where there is none, and ``other`` its value, where it was given."""

    name: str
    paper: str
    argument: str
    rule: Rule
    default: float | None
    least: float
    most: float | None
    fit: Fit | None
    second: str | None = None
    other: float | None = None

    @property
    def summary(self) -> str:
        """First line of the function's docstring."""
        return (self.rule.__doc__ or "").strip().split("\n")[0]


POLICIES: dict[str, Policy] = {}


def policy(
    name: str,
    *,
    paper: str,
    argument: str,
    default: float | None = None,
    least: float = 0.0,
    most: float | None = 1.0,
    fit: Fit | None = None,
    second: str | None = None,
) -> Callable[[Rule], Rule]:
    """Declare a policy; see any file in this folder."""

    def register(rule: Rule) -> Rule:
        POLICIES[name] = Policy(name, paper, argument, rule, default, least, most, fit, second)
        return rule

    return register


def all_policies() -> dict[str, Policy]:
    """Every policy by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    return POLICIES


def parse(text: str) -> tuple[Policy, float]:
    """``NAME[:NUMBER[/NUMBER]]``; a `FlexmoeError` for what is no policy or no number for it."""
    name, colon, numbers = text.partition(":")
    number, slash, other = numbers.partition("/")
    known = all_policies()
    if name not in known:
        raise did_you_mean(name, known, "policy")
    found = known[name]
    try:
        value = float(number) if colon else found.default
    except ValueError:
        value = math.nan
    if value is None:
        raise FlexmoeError(f"policy '{name}' needs a number: {name}:NUMBER, {found.argument}")
    if not value > found.least or (found.most is not None and not value < found.most):
        most = "the experts of a token" if found.most is None else f"{found.most:g}"
        raise FlexmoeError(
            f"policy '{text}': expected a number between {found.least:g} and {most}, "
            f"{found.argument}"
        )
    if not slash:
        return found, value
    if found.second is None or not other.isdigit() or not int(other):
        second = "takes one number" if found.second is None else f"the second is {found.second}"
        raise FlexmoeError(f"policy '{text}': {second}")
    return replace(found, other=float(other)), value


@dataclass
class Fitted:
    """A policy for one model: ``numbers`` of every layer, found on first use from the tokens
    ``ids`` [n, t]."""

    policy: Policy
    value: float
    ids: Tensor
    numbers: dict[int, float] = field(default_factory=dict)
    facts: dict[int, LayerFacts] = field(default_factory=dict)
    batch: Batch = field(default_factory=Batch)

    def use(self, model: PreTrainedModel) -> None:
        """The policy is on for ``model`` until `stop`; it goes with any budget. Under a router rule
        it must be fitted before (`fit`)."""
        stop(model)
        self.fit(model)
        layers, hooks = expert_layers(model), ExitStack()
        reads = Reads(() if self.policy.other is None else ("router",))
        around = hooks.enter_context(around_experts(layers, [reads]))
        note = partial(_note_batch, self.batch)
        hooks.callback(model.register_forward_pre_hook(note, with_kwargs=True).remove)
        model.flexmoe_policy_hooks = hooks
        for layer in layers:
            i = layer.index
            facts = replace(self.facts[i], around=around[i])
            layer.module.flexmoe_policy = _edit(self.policy.rule, facts, self.numbers[i])
        choose_function(model)

    def fit(self, model: PreTrainedModel) -> None:
        """Find the numbers, unless they are known: of the unpruned model, so that they do not
        depend on the budget that comes first. A router rule is undone for it."""
        if self.facts:
            return
        restore(model)
        layers = expert_layers(model)
        weight = routing_weights(model, self.ids)
        second = self.policy.other
        facts = [LayerFacts(layer, weight[layer.index], self.batch, second) for layer in layers]
        if second is not None and second > min(layer.E for layer in layers):
            raise FlexmoeError(
                f"policy '{self.policy.name}': {second:g} is more than the experts of a layer, "
                f"{min(layer.E for layer in layers)}"
            )
        K = min(f.K for f in facts)
        if self.policy.most is None and not self.value < K:
            raise FlexmoeError(
                f"policy '{self.policy.name}:{self.value:g}': a token is sent to {K} experts, "
                "expected a number below that"
            )
        fit = self.policy.fit or (lambda facts, number: [number] * len(facts))
        numbers = fit(facts, self.value)
        self.numbers = {f.layer.index: n for f, n in zip(facts, numbers, strict=True)}
        self.facts = {f.layer.index: f for f in facts}


def _edit(rule: Rule, facts: LayerFacts, number: float) -> Edit:
    return lambda routed: rule(routed, facts, number)


def _note_batch(batch: Batch, model: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
    ids, mask = kwargs.get("input_ids", args[0] if args else None), kwargs.get("attention_mask")
    batch.sequences = 1 if ids is None else ids.shape[0]
    batch.real_T = None
    if isinstance(ids, Tensor) and isinstance(mask, Tensor) and mask.shape == ids.shape:
        batch.real_T = mask.flatten().bool()  # not where the mask is also of a cache


def stop(model: PreTrainedModel) -> None:
    """Experts compute all that the router asks for."""
    hooks = model.__dict__.pop("flexmoe_policy_hooks", None)
    if hooks is not None:
        hooks.close()
    for layer in expert_layers(model):
        layer.module.__dict__.pop("flexmoe_policy", None)
    choose_function(model)


class _Weights:
    """Notes the routing weights of the pairs that go by, largest first."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []

    __call__ = staticmethod(unchanged)

    def see(self, seen: Seen) -> None:
        self.parts.append(seen.weight_TK.float().sort(1, descending=True).values.cpu())


def routing_weights(model: PreTrainedModel, ids: Tensor) -> dict[int, Tensor]:
    """Routing weights [N, K] of all tokens of the windows ``ids``, largest first, by layer."""
    layers = expert_layers(model)
    for layer in layers:
        layer.module.flexmoe_observer = _Weights()
    with torch.no_grad(), experts_function(model, "flexmoe_observe"):
        for window in ids.split(1):
            model(input_ids=window.to(model.device), use_cache=False)
    return {
        layer.index: torch.cat(layer.module.__dict__.pop("flexmoe_observer").parts)
        for layer in layers
    }
