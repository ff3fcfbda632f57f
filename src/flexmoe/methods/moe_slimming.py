"""MoE-Slimming (arXiv 2606.18304): how active a channel is, and what its expert and layer count.

How much they count follows from a local problem: a decoder layer with the outputs of its routed
experts scaled against itself. The authors take its loss and gradients with a backward pass; both
are sums of inner products, so that a forward pass gives them. Scores of an expert add up to its
weight and those of a layer to its loss, which is how the allocator ``coverage`` reads them.

Their code knows seven ways to score channels: by activations here, by gradients in
moe_slimming_saliency.py, by weights in moe_slimming_weights.py.

The authors combine batches by a moving average, so that their order matters; here all tokens count
the same, and none are clipped. The residual stream is that of routed experts, without shared ones.
"""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic

ALPHA, TINY = 0.9, 1e-6  # as in the authors' code


@statistic("gate2_EI", when="forward")
def gate2(pairs: Pairs) -> Tensor:
    """Squared gate projection (up projection where there is none) per routed token [S, I]."""
    return pairs.pre_SI[0].float().square()


@statistic("up2_EI", when="forward")
def up2(pairs: Pairs) -> Tensor:
    """Squared up projection per routed token [S, I]."""
    return pairs.pre_SI[-1].float().square()


@statistic("part_E", when="forward", reads=("residual",))
def part(pairs: Pairs) -> Tensor:
    """Routing weight x (expert's output . output of all routed experts) over the squared norm of
    the residual stream behind them, of every pair [S]."""
    out_SH = pairs.all.out_TH[pairs.token_S].float()
    behind_SH = pairs.residual_TH[pairs.token_S].float() + out_SH
    along_S = (pairs.y_SH.float() * out_SH).sum(1)
    return pairs.weight_S.float() * along_S / (behind_SH.square().sum(1) + TINY)


def places(layer: ExpertLayer) -> tuple[str, ...]:
    """Where channels are looked at, as the ends of statistics' names: activation, up, gate."""
    return ("_EI", "_up_EI", *(("_gate_EI",) if layer.module.has_gate else ()))


def over_mean(parts: list[Tensor]) -> Tensor:
    """Mean of the ``parts`` [E, I], over the layer's mean of it."""
    mean_EI = torch.stack(parts).mean(0)
    return mean_EI / mean_EI.mean().clamp_min(1e-30)


def activity(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Mean of the norms over tokens of gate, up and activation [E, I], over the layer's mean."""
    sides = ("activation2_EI", "up2_EI", *(("gate2_EI",) if layer.module.has_gate else ()))
    return over_mean([stats[name].sqrt() for name in sides])


def layer_loss(stats: LayerStatistics) -> Tensor:
    """The local problem's loss, a sum over tokens: the relative squared change of the residual
    stream when routed experts are scaled by `ALPHA`."""
    return (1 - ALPHA) ** 2 * stats["part_E"].sum()


def attribution(stats: LayerStatistics) -> Tensor:
    """Minus the mean over an expert's tokens of (output x the gradient of that loss), x the share
    of tokens that it sees [E]; outputs are those scaled by `ALPHA`."""
    usage_E = stats["count_E"] / max(stats.tokens, 1)
    return 2 * ALPHA * (1 - ALPHA) * stats.mean("part_E") * usage_E


def shared_out(channel_EI: Tensor, stats: LayerStatistics) -> Tensor:
    """What channels are worth among those of their expert, as scores [E, I] whose positive part
    adds up to the expert's weight, and that of all to the layer's loss."""
    weight_E = attribution(stats).clamp_min(0).sqrt()
    weight_E = layer_loss(stats) * weight_E / weight_E.sum().clamp_min(1e-30)
    total_E1 = channel_EI.clamp_min(0).sum(1, keepdim=True).clamp_min(1e-30)
    return weight_E[:, None] * channel_EI / total_E1


@method(
    "moe-slimming",
    paper="MoE-Slimming, arXiv:2606.18304",
    needs=("activation2_EI", "gate2_EI", "up2_EI", "part_E"),
    allocate="coverage",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Loss of the layer's local problem x expert's share of it x channel's share of activations."""
    return shared_out(activity(layer, stats), stats)
