"""MoE-Slimming (arXiv 2606.18304), its default channel score: how active a channel is.

The authors combine batches by a moving average, so that their order matters; here all tokens count
the same. Its shares of layers and experts (coverage weighed by a local loss) are not covered.
"""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("gate2_EI", when="forward")
def gate2(pairs: Pairs) -> Tensor:
    """Squared gate projection (up projection where there is none) per routed token [S, I]."""
    return pairs.pre_SI[0].float().square()


@statistic("up2_EI", when="forward")
def up2(pairs: Pairs) -> Tensor:
    """Squared up projection per routed token [S, I]."""
    return pairs.pre_SI[-1].float().square()


@method(
    "moe-slimming",
    paper="MoE-Slimming, arXiv:2606.18304 (activation)",
    needs=("activation2_EI", "gate2_EI", "up2_EI"),
    allocate="layer",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean of the norms over tokens of gate, up and activation, over the layer's mean of it."""
    sides = ("activation2_EI", "up2_EI", *(("gate2_EI",) if layer.module.has_gate else ()))
    norm_EI = sum((stats[name].sqrt() for name in sides), 0 * stats["up2_EI"]) / len(sides)
    return norm_EI / norm_EI.mean().clamp_min(1e-30)
