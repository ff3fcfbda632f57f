"""SEAP (arXiv 2503.07605), score of its default: how much a channel's activation varies.

Published for dense models; here over the tokens of the expert that the channel belongs to.
"""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("activation_EI", when="forward")
def activation(pairs: Pairs) -> Tensor:
    """Channel activation per routed token [S, I]."""
    return pairs.h_SI.float()


@method(
    "seap",
    paper="SEAP, arXiv:2503.07605 (per expert)",
    needs=("activation_EI", "activation2_EI"),
    allocate="logistic",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Variance of a channel's activation over routed tokens x squared norm of its down column."""
    spread_EI = stats.mean("activation2_EI") - stats.mean("activation_EI").square()
    (down_EIH,) = layer.channel_major("down_proj", layer.module.down_proj.detach())
    down2_EI = down_EIH.double().square().sum(2).cpu()
    return spread_EI.clamp_min(0) * down2_EI
