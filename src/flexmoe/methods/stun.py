"""STUN's clustering stage (arXiv 2409.06211): experts whose router rows are alike are one group,
of which the member nearest to the mean of their weights stays. No data (its lambda = (1, 0)).

The paper cuts all layers at one distance, found by search: the score is the distance at which an
expert is absorbed, so that the global allocator does the same. Departures: linkage is complete (the
authors' loop is a little weaker and depends on set order), representatives are chosen among those
of the two groups that merge, and small groups are not averaged.
"""

import torch
from torch import Tensor

from flexmoe.around import router_rows
from flexmoe.experts import ExpertLayer
from flexmoe.grouping import absorbed
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics


def products(layer: ExpertLayer) -> Tensor:
    """Inner products [E, E] of the experts' weights, all matrices of an expert as one vector."""
    matrices = [p.detach().flatten(1).float() for p in layer.parameters.values() if p.dim() == 3]
    return sum((m @ m.T for m in matrices), torch.zeros(())).double().cpu()


@method(
    "stun",
    paper="STUN, arXiv:2409.06211 (stage 1)",
    unit="expert",
    allocate="global",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Distance of router rows at which another expert stands for this one; no data."""
    rows_EH, product_EE = router_rows(layer), products(layer)

    def nearer(members: list[int], a: int, b: int) -> bool:
        def from_mean(e: int) -> float:  # squared, less what all members share
            return float(product_EE[e, e] - 2 * product_EE[e, members].mean())

        if len(members) == 2:  # both are as near: the larger one
            return bool(product_EE[a, a] >= product_EE[b, b])
        return from_mean(a) <= from_mean(b)

    return absorbed(torch.cdist(rows_EH, rows_EH), "complete", nearer)
