"""SEER-MoE's soft counting (arXiv 2404.05089): how much routing weight an expert is given.

With the weights that the model really multiplies by, so renormalised where the model does that.
"""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("weight_E", when="forward")
def weight(pairs: Pairs) -> Tensor:
    """Routing weight of every pair [S]."""
    return pairs.weight_S.float()


@method(
    "seer",
    paper="SEER-MoE (soft), arXiv:2404.05089",
    needs=("weight_E",),
    unit="expert",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Sum of routing weights over the tokens routed to the expert."""
    return stats["weight_E"]
