"""Change of the router's norm by fine-tuning (Chowdhury et al., arXiv 2405.16646).

The second checkpoint, the one before fine-tuning, is given with ``--reference``.
"""

from torch import Tensor

from flexmoe.around import router_rows
from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics


@method(
    "router-change",
    paper="Chowdhury et al., arXiv:2405.16646",
    unit="expert",
    reference=True,
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Norm of the expert's router row less that before fine-tuning (signed); no data."""
    return router_rows(layer).norm(dim=1) - stats["reference_router_EH"].norm(dim=1)
