"""MAN (arXiv 2606.15716): mean activation norm, without routing weight and without frequency."""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics


@method("man", paper="MAN, arXiv:2606.15716", needs=("norm_E",), unit="expert", router="remove")
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over routed tokens of the norm of the expert's output."""
    return stats.mean("norm_E")
