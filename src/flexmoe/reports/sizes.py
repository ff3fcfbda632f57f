"""Where the bytes of a model are, and which of them pruning takes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flexmoe.plan import Plan
from flexmoe.shards import Source

KEPT, GONE = "routed experts, kept", "routed experts, pruned"
# Parts beside the routed experts by a word in the tensor's name; the first that fits counts.
WORDS = {
    "shared experts": ("shared",),
    "routers": ("router", ".gate.", "correction_bias"),
    "embeddings and head": ("embed", "lm_head", "wte"),
    "attention and other mixing": ("attn", "attention", "mamba", "conv", "mixer"),
}
REST = "dense layers, norms, others"


def parts(plan: Plan, weights: str | Path | None, budgets: Sequence[float]) -> dict[str, list[int]]:
    """Bytes of each part of the model at each of ``budgets`` as a ragged export stores it, the
    pruned ones too, so that all sums are those of the full model.

    ``weights`` is the checkpoint's folder; without it all beside routed experts is one part.
    """
    routed = plan.routed_parameters * plan.bytes_per_parameter
    beside = {"all but routed experts": plan.bytes_full - routed}
    if weights is not None:
        source = Source.open(Path(weights), plan)
        experts = {piece.name for layer in source.layers.values() for piece in layer.stored}
        found: Counter[str] = Counter()
        for name, info in source.checkpoint.tensors.items():
            if name not in experts:
                found[_part(name)] += info.bytes
        beside = {name: found[name] for name in (*WORDS, REST) if found[name]}
        routed = plan.bytes_full - sum(beside.values())
    gone = [plan.bytes_full - plan.member(share).bytes for share in budgets]
    return {
        **{name: [size] * len(budgets) for name, size in beside.items()},
        KEPT: [routed - size for size in gone],
        GONE: gone,
    }


def _part(name: str) -> str:
    return next((part for part, words in WORDS.items() if any(w in name for w in words)), REST)
