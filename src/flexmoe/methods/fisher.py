"""Second-order cost of switching a channel off, by the empirical Fisher information of its mask."""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("fisher_EI", when="backward")
def fisher(pairs: Pairs) -> Tensor:
    """(activation x its gradient)^2 per routed token and channel [S, I]."""
    assert pairs.grad_SI is not None
    return (pairs.h_SI.float() * pairs.grad_SI.float()).square()


@method("fisher", paper="Theis et al., arXiv:1801.05787, per channel", needs=("fisher_EI",))
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Sum over tokens of (channel activation x its loss gradient)^2: one forward and backward."""
    return stats["fisher_EI"]
