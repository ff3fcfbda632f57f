"""PEU of PreMoe (arXiv 2505.17639v3): predicted utility of an expert from the router's logits.

A token's pool are its largest logits, as many as it is sent to experts (the paper's K_a is not
published). Those count whose probability within the pool reaches a threshold that is the mean over
tokens of the largest one, which takes a pass of its own.
"""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


def pool(pairs: Pairs) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, probabilities within the pool, and experts of every token's pool [T, K]."""
    K = pairs.all.index_TK.shape[1]
    logit_TK, expert_TK = pairs.logits_TE.double().topk(K)
    return logit_TK, logit_TK.softmax(1), expert_TK


def per_expert(pairs: Pairs, expert: Tensor, value: Tensor) -> Tensor:
    """Sums [E] of values given to experts."""
    assert pairs.layer is not None
    zeros_E = value.new_zeros(pairs.layer.E)
    return zeros_E.index_add_(0, expert.flatten(), value.flatten())


@statistic("pool_top_E", when="batch", reads=("router",))
def pool_top(pairs: Pairs) -> Tensor:
    """Sum over tokens of the largest probability in the pool, by the expert that has it [E]."""
    _, share_TK, expert_TK = pool(pairs)
    return per_expert(pairs, expert_TK[:, 0], share_TK[:, 0])


@statistic("utility_E", when="batch", reads=("router",), after=("pool_top_E",))
def utility(pairs: Pairs, earlier: LayerStatistics) -> Tensor:
    """Sum over tokens of max(logit, sigmoid(logit)) of those above the threshold [E]."""
    logit_TK, share_TK, expert_TK = pool(pairs)
    threshold = float(earlier["pool_top_E"].sum()) / max(earlier.tokens, 1)
    value_TK = torch.maximum(logit_TK, logit_TK.sigmoid()) * (share_TK >= threshold)
    return per_expert(pairs, expert_TK, value_TK)


@method(
    "peu", paper="PreMoe v3, arXiv:2505.17639", needs=("utility_E",), unit="expert", router="remove"
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over all tokens of max(logit, sigmoid(logit)) where the router is sure of the expert."""
    return stats["utility_E"] / max(stats.tokens, 1)
