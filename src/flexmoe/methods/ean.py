"""EAN, expert activation norm, as REAP's authors compute it (sum over tokens of the norm).

MC-Suite, whose criterion it is, adds up norms of output columns instead: see mc_suite.py.
"""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("norm_E", when="forward")
def norm(pairs: Pairs) -> Tensor:
    """Norm of the expert's output, of every pair [S]."""
    return pairs.y_SH.float().norm(dim=1)


@method(
    "ean",
    paper="EAN as in REAP, arXiv:2510.13999",
    needs=("norm_E",),
    unit="expert",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Sum over routed tokens of the norm of the expert's output."""
    return stats["norm_E"]
