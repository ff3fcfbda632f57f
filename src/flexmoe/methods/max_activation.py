"""The largest entry an expert puts out: how REAP's code finds super experts, those a model cannot
do without. Signed and floored at 0 as there, not a magnitude."""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("peak_E", when="forward", merge="max")
def peak(pairs: Pairs) -> Tensor:
    """Largest entry of the expert's output, of every pair [S]."""
    return pairs.y_SH.float().amax(1)


@method(
    "max-activation",
    paper="super experts as in REAP, arXiv:2510.13999",
    needs=("peak_E",),
    unit="expert",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Largest entry of the expert's output over all routed tokens, at least 0."""
    return stats["peak_E"]
