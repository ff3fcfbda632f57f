"""EASY-EP (arXiv 2504.06792): what an expert adds, weighed by how far its token is moved.

The residual stream and its change are those of the routed experts alone, without shared ones. Texts
of several domains are added up token by token; the paper brings each domain's scores to sum 1.
"""

import torch.nn.functional as F
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("moved_norm_E", when="forward", reads=("residual",))
def moved_norm(pairs: Pairs) -> Tensor:
    """Routing weight x norm of the output x (1 - cosine of the residual stream before and after
    the routed experts), of every pair [S]."""
    before_TH, added_TH = pairs.residual_TH.float(), pairs.all.out_TH.float()
    moved_T = (1 - F.cosine_similarity(before_TH, before_TH + added_TH)).clamp_min(0)
    return pairs.weight_S.float() * pairs.y_SH.float().norm(dim=1) * moved_T[pairs.token_S]


@method(
    "easy-ep",
    paper="EASY-EP, arXiv:2504.06792",
    needs=("moved_norm_E",),
    unit="expert",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Sum over routed tokens of weight x output norm x how far the token's residual turns."""
    return stats["moved_norm_E"]
