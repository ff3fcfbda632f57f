"""REAP (arXiv 2510.13999): what an expert adds to its layer's output, on average where it is used.

With the weights that the model really multiplies by. The authors' code takes the softmax of the
router's logits instead, which is the same for softmax routers and not for sigmoid ones.
"""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("weighted_norm_E", when="forward")
def weighted_norm(pairs: Pairs) -> Tensor:
    """Routing weight x norm of the expert's output, of every pair [S]."""
    return pairs.weight_S.float() * pairs.y_SH.float().norm(dim=1)


@method(
    "reap",
    paper="REAP, arXiv:2510.13999",
    needs=("weighted_norm_E",),
    unit="expert",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over routed tokens of routing weight x norm of the expert's output."""
    return stats.mean("weighted_norm_E")
