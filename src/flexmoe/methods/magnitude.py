"""Magnitude: the classic baseline that needs no data."""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics


@method("magnitude", paper="Han et al., arXiv:1506.02626 (per channel)", allocate="layer")
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Sum of squares of a channel's parameters: gate row, up row, down column; no data."""
    views = [
        view.double().square().flatten(2).sum(2) if view.dim() == 3 else view.double().square()
        for name, parameter in layer.parameters.items()
        for view in layer.channel_major(name, parameter)
    ]
    return sum(views[1:], start=views[0])
