"""Which stored pattern a query needs: the nearest signature, if it is near enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedModel

from flexmoe.errors import FlexmoeError
from flexmoe.premoe.pattern import Pattern
from flexmoe.premoe.signature import signatures


@dataclass(frozen=True)
class Match:
    """``task`` whose pattern a query needs, None where none is near enough: then the full model
    answers. ``nearest`` is the nearest task in any case, as a share of how far text of each may
    lie; ``distance`` from it in deviations (see `nearness`), ``reach`` how far its text may lie
    (see `Reach`); ``distances`` from all."""

    task: str | None
    nearest: str
    distance: float
    reach: float
    distances: dict[str, float]


def retrieve(model: PreTrainedModel, patterns: Sequence[Pattern], ids: Tensor) -> Match:
    """The pattern nearest to one prompt ``ids`` [t], by the distance of signatures.

    Only what stands before the first MoE layer's experts is computed, see `router_logits`, so it
    does not matter which experts are active, nor whether any are in memory.
    """
    if ids.dim() != 1 or not len(ids):
        raise FlexmoeError(f"a query is the tokens [t] of one prompt, found {list(ids.shape)}")
    return nearest(patterns, signatures(model, ids[None])[0], len(ids))


def nearest(patterns: Sequence[Pattern], signature_E: Tensor, tokens: int) -> Match:
    """The match of a prompt of so many tokens with this signature."""
    distance = [pattern.distance(signature_E, tokens) for pattern in patterns]
    reach = [pattern.reach_at(tokens) for pattern in patterns]
    at = min(range(len(patterns)), key=lambda n: distance[n] / max(reach[n], 1e-30))
    return Match(
        task=patterns[at].task if distance[at] <= reach[at] else None,
        nearest=patterns[at].task,
        distance=distance[at],
        reach=reach[at],
        distances={p.task: d for p, d in zip(patterns, distance, strict=True)},
    )
