"""MSAN (arXiv 2606.15716): mean squared activation norm."""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("norm2_E", when="forward")
def norm2(pairs: Pairs) -> Tensor:
    """Squared norm of the expert's output, of every pair [S]."""
    return pairs.y_SH.float().square().sum(1)


@method("msan", paper="MSAN, arXiv:2606.15716", needs=("norm2_E",), unit="expert", router="remove")
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over routed tokens of the squared norm of the expert's output."""
    return stats.mean("norm2_E")
