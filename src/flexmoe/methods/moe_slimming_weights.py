"""What MoE-Slimming's code (arXiv 2606.18304) makes of a channel's weights: their size alone, times
what they are multiplied by, and times their gradient in the local problem of moe_slimming.py.

Each is the mean over the three matrices of what a channel's row (its column, in the down
projection) gives. Shares of layers and experts are as there. The gradient is that of a batch, so
its size matters; batches add up and are not combined by a moving average.
"""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.methods.moe_slimming import over_mean, shared_out
from flexmoe.methods.moe_slimming_saliency import output_slopes, slopes
from flexmoe.statistics import LayerStatistics, Pairs, statistic

PAPER = "MoE-Slimming, arXiv:2606.18304"


def matrices(layer: ExpertLayer) -> list[Tensor]:
    """The weights [E, I, H] with one channel a row: down, up and, where there is one, gate."""
    found = [
        view
        for name, parameter in layer.parameters.items()
        if parameter.dim() == 3
        for view in layer.channel_major(name, parameter.detach())
    ]
    return found[::-1]


@statistic("input2_EH", when="forward")
def input2(pairs: Pairs) -> Tensor:
    """Squared input of the experts per routed token [S, H]."""
    return pairs.all.x_TH[pairs.token_S].float().square()


@statistic("weight_slope_EI", when="batch", reads=("residual",), whole=True)
def weight_slope(pairs: Pairs) -> Tensor:
    """Sum of |weight x its gradient| over a channel's row, mean over matrices [E, I]."""
    assert pairs.layer is not None
    weights, x_SH = matrices(pairs.layer), pairs.all.x_TH[pairs.token_S].float()
    at_channels = [pairs.h_SI.float(), *slopes(pairs)[1:]]
    at_hidden = [output_slopes(pairs), *(x_SH for _ in weights[1:])]
    sum_EI = torch.zeros(pairs.layer.E, pairs.layer.I, device=x_SH.device)
    for e, a, b in pairs.all.routing.segments:
        for weight, left_SI, right_SH in zip(weights, at_channels, at_hidden, strict=True):
            sum_EI[e] += (weight[e].float() * (left_SI[a:b].T @ right_SH[a:b])).abs().sum(1)
    return sum_EI / len(weights)


def size(layer: ExpertLayer) -> Tensor:
    """Mean over matrices of the norm of a channel's row [E, I], over the layer's mean."""
    return over_mean([weight.double().norm(dim=2).cpu() for weight in matrices(layer)])


def size_times_input(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over matrices of the sum over a channel's row of |weight| x the norm over tokens of what
    it is multiplied by [E, I], over the layer's mean."""
    down, *others = (weight.double().abs().cpu() for weight in matrices(layer))
    input_EH1 = stats["input2_EH"].sqrt()[:, :, None]
    parts = [(weight @ input_EH1)[:, :, 0] for weight in others]
    return over_mean([down.sum(2) * stats["activation2_EI"].sqrt(), *parts])


@method("moe-slimming-weight", paper=f"{PAPER} (weight)", needs=("part_E",), allocate="coverage")
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """As moe-slimming, with the channel's share of the norms of weights."""
    return shared_out(size(layer), stats)


@method(
    "moe-slimming-wa",
    paper=f"{PAPER} (wa)",
    needs=("input2_EH", "activation2_EI", "part_E"),
    allocate="coverage",
)
def score_inputs(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """As moe-slimming, with the channel's share of size of weights x norm of their inputs."""
    return shared_out(size_times_input(layer, stats), stats)


@method(
    "moe-slimming-wg",
    paper=f"{PAPER} (wg)",
    needs=("weight_slope_EI", "part_E"),
    allocate="coverage",
)
def score_gradients(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """As moe-slimming, with the channel's share of the size of weights x their gradients."""
    return shared_out(stats["weight_slope_EI"], stats)
