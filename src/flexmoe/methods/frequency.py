"""How often the router picks an expert: the oldest criterion, Z-code M3's utilisation."""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics


@method(
    "frequency",
    paper="Z-code M3 (utilisation), arXiv:2109.10465",
    needs=("count_E",),
    unit="expert",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Number of tokens routed to the expert."""
    return stats["count_E"]
