"""MoE-Slimming's attribution (arXiv 2606.18304), its other channel score: activity x gradient of
the local problem that moe_slimming.py describes; and what else its code makes of these gradients.

As the authors' code has it: the mean size of what flows, times the norm over tokens of the
gradient there (the paper means the product token by token, whose variables are overwritten in that
code; with its sign that is ``moe-slimming-contribution``). The gradients follow from the outputs,
so that a forward pass is enough. Shares of layers and experts are as there; batches are not
combined by a moving average, and none of a channel's tokens are clipped.
"""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.methods.moe_slimming import ALPHA, TINY, over_mean, places, shared_out
from flexmoe.statistics import LayerStatistics, Pairs, statistic
from flexmoe.storage import activation_function


def output_slopes(pairs: Pairs) -> Tensor:
    """Gradient [S, H] of the local loss at the output of each pair's expert."""
    out_TH = pairs.all.out_TH.float()
    behind_TH = pairs.residual_TH.float() + out_TH
    slope_TH = -2 * (1 - ALPHA) * out_TH / (behind_TH.square().sum(1, keepdim=True) + TINY)
    return ALPHA * pairs.weight_S.float()[:, None] * slope_TH[pairs.token_S]


def slopes(pairs: Pairs) -> list[Tensor]:
    """Gradients [S, I] of the local loss at channel activations, up and gate projections."""
    assert pairs.layer is not None
    module, slope_SH = pairs.layer.module, output_slopes(pairs)
    (down_EIH,) = pairs.layer.channel_major("down_proj", module.down_proj)
    slope_SI = torch.zeros_like(pairs.h_SI, dtype=torch.float32)
    for e, start, stop in pairs.all.routing.segments:
        slope_SI[start:stop] = slope_SH[start:stop] @ down_EIH[e].float().T
    with torch.enable_grad():
        pre = [side.detach().float().requires_grad_() for side in pairs.pre_SI]
        h_SI = activation_function(module)(torch.cat(pre, -1))
        return [slope_SI, *torch.autograd.grad(h_SI, pre[::-1], slope_SI)]


@statistic("flow_EI", when="forward")
def flow(pairs: Pairs) -> Tensor:
    """Size of the channel activation [S, I]."""
    return pairs.h_SI.float().abs()


@statistic("flow_up_EI", when="forward")
def flow_up(pairs: Pairs) -> Tensor:
    """Size of the up projection [S, I]."""
    return pairs.pre_SI[-1].float().abs()


@statistic("flow_gate_EI", when="forward")
def flow_gate(pairs: Pairs) -> Tensor:
    """Size of the gate projection (up projection where there is none) [S, I]."""
    return pairs.pre_SI[0].float().abs()


@statistic("slope2_EI", when="forward", reads=("residual",))
def slope2(pairs: Pairs) -> Tensor:
    """Squared gradient at the channel activation [S, I]."""
    return slopes(pairs)[0].square()


@statistic("slope2_up_EI", when="forward", reads=("residual",))
def slope2_up(pairs: Pairs) -> Tensor:
    """Squared gradient at the up projection [S, I]."""
    return slopes(pairs)[1].square()


@statistic("slope2_gate_EI", when="forward", reads=("residual",))
def slope2_gate(pairs: Pairs) -> Tensor:
    """Squared gradient at the gate projection (up projection where there is none) [S, I]."""
    return slopes(pairs)[-1].square()


@statistic("contribution_EI", when="forward", reads=("residual",))
def contribution(pairs: Pairs) -> Tensor:
    """Mean over activation, up and gate of minus value x gradient [S, I]."""
    values = [pairs.h_SI, *reversed(pairs.pre_SI)]
    both = zip(values, slopes(pairs), strict=True)
    return -torch.stack([value.float() * slope for value, slope in both]).mean(0)


SLOPES = ("slope2_EI", "slope2_up_EI", "slope2_gate_EI")
FLOWS = ("flow_EI", "flow_up_EI", "flow_gate_EI")


def saliency(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over activation, up and gate of mean size x norm of gradients [E, I], over the layer's
    mean of it."""
    ends = places(layer)
    return over_mean([stats.mean(f"flow{e}") * stats[f"slope2{e}"].sqrt() for e in ends])


def gradient(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over activation, up and gate of the norm of gradients [E, I], over the layer's mean."""
    return over_mean([stats[f"slope2{end}"].sqrt() for end in places(layer)])


def contributed(stats: LayerStatistics) -> Tensor:
    """Mean over an expert's tokens of `contribution` [E, I]."""
    return stats.mean("contribution_EI")


@method(
    "moe-slimming-saliency",
    paper="MoE-Slimming, arXiv:2606.18304 (attribution)",
    needs=(*FLOWS, *SLOPES, "part_E"),
    allocate="coverage",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """As moe-slimming, with the channel's share of activity x gradient of the local problem."""
    return shared_out(saliency(layer, stats), stats)


@method(
    "moe-slimming-gradient",
    paper="MoE-Slimming, arXiv:2606.18304 (grad)",
    needs=(*SLOPES, "part_E"),
    allocate="coverage",
)
def score_gradient(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """As moe-slimming, with the channel's share of gradients of the local problem."""
    return shared_out(gradient(layer, stats), stats)


@method(
    "moe-slimming-contribution",
    paper="MoE-Slimming, arXiv:2606.18304 (token_contrib)",
    needs=("contribution_EI", "part_E"),
    allocate="coverage",
)
def score_contribution(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """As moe-slimming, with the channel's share of minus value x gradient, with its sign."""
    return shared_out(contributed(stats), stats)
