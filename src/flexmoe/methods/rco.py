"""RCO (arXiv 2605.00649): its prior, from which the allocator ``rco`` learns (see flexmoe.rco)."""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics


@method(
    "rco",
    paper="RCO, arXiv:2605.00649",
    needs=("weight_E",),
    unit="expert",
    allocate="rco",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Sum of routing weights, from 0 to 1 within the layer: the prior that learning starts from."""
    weight_E = stats["weight_E"]
    least = weight_E.min()
    return (weight_E - least) / (weight_E.max() - least).clamp_min(1e-30)
