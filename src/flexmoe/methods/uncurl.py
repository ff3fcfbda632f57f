"""UNCURL's grouping (arXiv 2409.01483): experts whose router logits go together are one group, of
which the most used stays.

The paper clusters spectrally for one target; here a tree of average linkage on the same affinity
serves all. It merges a group's experts into one, which a score cannot say: the others are dropped.
"""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.grouping import absorbed
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("logit_product_EE", when="batch", reads=("router",))
def logit_product(pairs: Pairs) -> Tensor:
    """Products of the experts' router logits, centred per token, summed over tokens [E, E]."""
    logits_TE = pairs.logits_TE.double()
    centred_TE = logits_TE - logits_TE.mean(1, keepdim=True)
    return centred_TE.T @ centred_TE


@method(
    "uncurl",
    paper="UNCURL, arXiv:2409.01483 (grouping)",
    needs=("count_E", "logit_product_EE"),
    unit="expert",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """1 - cosine of router logits over tokens at which a more used expert stands for this one."""
    product_EE, count_E = stats["logit_product_EE"], stats["count_E"]
    norm_E = product_EE.diagonal().clamp_min(1e-30).sqrt()
    cosine_EE = product_EE / torch.outer(norm_E, norm_E)
    return absorbed(1 - cosine_EE, "average", lambda _, a, b: bool(count_E[a] >= count_E[b]))
