"""CAMERA (arXiv 2508.02322): energy a channel adds to its layer's output; forward passes only.

CAMERA-P prunes layer after layer, each scored behind pruned ones: ``compress --sequential SHARE``.
Of DeepSeek and Qwen2 the authors rank channels of shared experts too; here those stay whole.
"""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic

ALPHA = 0.9  # share of the maximum term, as in the authors' scripts


@statistic("energy_sum_EI", when="forward")
def energy_sum(pairs: Pairs) -> Tensor:
    """(routing weight x activation)^2 per routed token [S, I], summed."""
    return (pairs.weight_S.float()[:, None] * pairs.h_SI.float()).square()


@statistic("energy_max_EI", when="forward", merge="max")
def energy_max(pairs: Pairs) -> Tensor:
    """The same, its maximum over tokens."""
    return energy_sum(pairs)


def energy(layer: ExpertLayer, stats: LayerStatistics, alpha: float) -> Tensor:
    """The energy [E, I] for a share ``alpha`` of the maximum term."""
    (down_EIH,) = layer.channel_major("down_proj", layer.module.down_proj.detach())
    mixed = (1 - alpha) * stats["energy_sum_EI"] + alpha * stats["energy_max_EI"]
    return mixed * down_EIH.double().square().sum(2).cpu()


@method(
    "camera",
    paper="CAMERA, arXiv:2508.02322",
    needs=("energy_sum_EI", "energy_max_EI"),
    allocate="layer",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Energy of (routing weight x activation), sum and maximum over tokens, x down norm^2."""
    return energy(layer, stats, ALPHA)
