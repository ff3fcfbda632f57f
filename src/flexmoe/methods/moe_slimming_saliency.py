"""MoE-Slimming's attribution (arXiv 2606.18304), its other channel score: activity x gradient of
the local problem that moe_slimming.py describes.

As the authors' code has it: the mean size of what flows, times the norm over tokens of the
gradient there (the paper means the product token by token, whose variables are overwritten in that
code). The gradients follow from the outputs, so that a forward pass is enough. Shares of layers and
experts are as there; batches are not combined by a moving average.
"""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.methods.moe_slimming import ALPHA, TINY, shared_out
from flexmoe.statistics import LayerStatistics, Pairs, statistic
from flexmoe.storage import activation_function


def slopes(pairs: Pairs) -> list[Tensor]:
    """Gradients [S, I] of the local loss at channel activations, up and gate projections."""
    assert pairs.layer is not None
    module, out_TH = pairs.layer.module, pairs.all.out_TH.float()
    behind_TH = pairs.residual_TH.float() + out_TH
    slope_TH = -2 * (1 - ALPHA) * out_TH / (behind_TH.square().sum(1, keepdim=True) + TINY)
    slope_SH = ALPHA * pairs.weight_S.float()[:, None] * slope_TH[pairs.token_S]
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


def saliency(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean over activation, up and gate of mean size x norm of gradients [E, I], over the layer's
    mean of it."""
    ends = ("_EI", "_up_EI", *(("_gate_EI",) if layer.module.has_gate else ()))
    count_E1 = stats["count_E"].clamp_min(1)[:, None]
    parts = [stats[f"flow{end}"] / count_E1 * stats[f"slope2{end}"].sqrt() for end in ends]
    mean_EI = torch.stack(parts).mean(0)
    return mean_EI / mean_EI.mean().clamp_min(1e-30)


@method(
    "moe-slimming-saliency",
    paper="MoE-Slimming, arXiv:2606.18304 (attribution)",
    needs=(
        "flow_EI",
        "flow_up_EI",
        "flow_gate_EI",
        "slope2_EI",
        "slope2_up_EI",
        "slope2_gate_EI",
        "part_E",
    ),
    allocate="coverage",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """As moe-slimming, with the channel's share of activity x gradient of the local problem."""
    return shared_out(saliency(layer, stats), stats)
