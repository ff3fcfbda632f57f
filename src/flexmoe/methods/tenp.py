"""TENP (arXiv 2606.09885): how much of its expert's output a channel makes, in its direction.

The paper has two scores: experts are whole or slim by one, and keep the channels that are best by
the other. Here a channel's score is its part in that of its expert, so that the scores of an expert
add up to its importance, which is how the allocator ``trapezoid`` reads them. Texts of several
domains are added up token by token; the paper brings each domain's importances to norm 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("projection_EI", when="forward")
def projection(pairs: Pairs) -> Tensor:
    """Activation x (down column . output) / norm of the output, per routed token [S, I]."""
    assert pairs.layer is not None
    down = pairs.layer.module.down_proj
    (down_EIH,) = pairs.layer.channel_major("down_proj", down)
    direction_SH = F.normalize(pairs.y_SH.float(), dim=1).to(down.dtype)
    along_SI = torch.empty_like(pairs.h_SI)
    for e, start, stop in pairs.all.routing.segments:
        along_SI[start:stop] = direction_SH[start:stop] @ down_EIH[e].T
    return pairs.h_SI.float() * along_SI.float()


@statistic("turned_norm_E", when="forward")
def turned_norm(pairs: Pairs) -> Tensor:
    """Routing weight x norm of the output x (1 - its cosine with the input), of every pair [S]."""
    x_SH, y_SH = pairs.all.x_TH[pairs.token_S].float(), pairs.y_SH.float()
    return pairs.weight_S.float() * y_SH.norm(dim=1) * (1 - F.cosine_similarity(x_SH, y_SH))


@method(
    "tenp",
    paper="TENP, arXiv:2606.09885",
    needs=("projection_EI", "turned_norm_E"),
    allocate="trapezoid",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """The expert's importance (`tenp-experts`) x the channel's part of the output along it."""
    projection_EI = stats["projection_EI"]
    whole_E1 = projection_EI.sum(1, keepdim=True).abs()  # the norms of outputs, but for biases
    return stats["turned_norm_E"][:, None] * projection_EI / whole_E1.clamp_min(1e-30)


@method(
    "tenp-experts",
    paper="TENP, arXiv:2606.09885 (experts)",
    needs=("turned_norm_E",),
    unit="expert",
)
def expert_score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Sum over routed tokens of weight x output norm x (1 - cosine of input and output)."""
    return stats["turned_norm_E"]
