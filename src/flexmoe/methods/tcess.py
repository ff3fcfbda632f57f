"""TCESS of PreMoe's first version (arXiv 2505.17639v1): the router's logits tell what a task needs.

Logits of the experts in a token's pool are added up, all others count 0, so that an expert chosen
with a negative logit ranks below one never chosen: as published; peu.py is the later remedy.
"""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic

POOL = 1  # the largest logits of a token that count, as in the authors' code


@statistic("pool_logit_E", when="batch", reads=("router",))
def pool_logit(pairs: Pairs) -> Tensor:
    """Sum over tokens of the raw logits of the experts in the token's pool [E]."""
    logits_TE = pairs.logits_TE.double()
    value_TP, expert_TP = logits_TE.topk(POOL)
    return torch.zeros_like(logits_TE[0]).index_add_(0, expert_TP.flatten(), value_TP.flatten())


@method(
    "tcess",
    paper="PreMoe v1, arXiv:2505.17639",
    needs=("pool_logit_E",),
    unit="expert",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over all tokens of the router's logit where the expert has the largest one, else 0."""
    return stats["pool_logit_E"] / max(stats.tokens, 1)
