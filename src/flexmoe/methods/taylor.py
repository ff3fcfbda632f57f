"""The ranking of FlexMoE: first-order Taylor term per parameter (arXiv 2606.27866, eq. 1-4)."""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, statistic


@statistic("taylor_EI", when="weights")
def taylor(weight: Tensor, grad: Tensor) -> Tensor:
    """Squared parameter times batch gradient, summed over the parameters of each channel [E, I]."""
    return (weight * grad).square().flatten(2).sum(2) if weight.dim() == 3 else (weight * grad) ** 2


@method("taylor", paper="FlexMoE, arXiv:2606.27866", needs=("taylor_EI",), allocate="actions")
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over batches of sum over a channel's 3H parameters of (parameter x batch gradient)^2."""
    return stats["taylor_EI"] / max(stats.batches, 1)
