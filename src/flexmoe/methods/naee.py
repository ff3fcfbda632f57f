"""NAEE, "Not All Experts are Equal" (arXiv 2402.14800): try every subset of a layer's experts.

The loss of a subset is the distance between the layer's output and its output when the router may
choose from the subset only; as in the authors' code it is a norm for each batch, added up, so that
the batch size matters a little (and, where memory is short, the parts that a batch goes in). They
take the best subset of one size. Members of a family must be nested, so here it is the chain of
subsets, one expert fewer each time, whose losses over those of the best of their size add up to the
least.

Their progressive form is `--sequential SHARE` with `--router remove`: layers before are pruned at
the share, and the distance is to what the layer gives in the unpruned model.
"""

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, full_width_forward
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic

SAME = 1e-3  # relative: the router as it is rebuilt here against the model's own, also in bf16


@statistic("subset_loss_C", when="batch", reads=("router", "target"))
def subset_loss(pairs: Pairs) -> Tensor:
    """Norm of the change of the layer's output for every subset (bit e: expert e is kept); infinite
    for those with too few experts to choose from [C]."""
    seen, layer = pairs.all, pairs.layer
    assert layer is not None
    (T, K), E = seen.index_TK.shape, layer.E
    one_T1 = torch.ones_like(seen.index_TK[:, :1])
    y_ETH = torch.stack(
        [
            full_width_forward(
                layer.module, seen.x_TH, e * one_T1, one_T1.to(seen.x_TH), lambda _, h_SI: h_SI
            )
            for e in range(E)
        ]
    )
    sums_to_one = torch.allclose(seen.weight_TK.float().sum(1), torch.ones(()).to(one_T1.device))
    token_T1 = torch.arange(T, device=one_T1.device)[:, None]
    out_TH, target_TH = seen.out_TH.double(), pairs.target_TH.double()

    def change(subset: int, from_TH: Tensor) -> float:
        gone_E = torch.tensor([not subset >> e & 1 for e in range(E)], device=one_T1.device)
        share_TE = pairs.logits_TE.masked_fill(gone_E, -torch.inf).softmax(1)
        weight_TK, index_TK = share_TE.topk(K)
        if sums_to_one:
            weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
        new_TH = (weight_TK[:, :, None] * y_ETH[index_TK, token_T1]).sum(1)
        return float((from_TH - new_TH.double()).norm())

    if not change(2**E - 1, out_TH) <= SAME * float(out_TH.norm()):
        raise FlexmoeError(
            f"layer {layer.index}: naee routes anew among fewer experts, which it knows how to do "
            "for routers that take the largest of a softmax; this model's is another one"
        )
    losses = [change(c, target_TH) if c.bit_count() >= K else torch.inf for c in range(2**E)]
    return torch.tensor(losses, dtype=torch.float64, device=one_T1.device)


@method(
    "naee",
    paper="NAEE, arXiv:2402.14800",
    needs=("subset_loss_C",),
    unit="expert",
    router="remove",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """When the expert leaves the best chain of subsets; tries all subsets, so for few experts."""
    loss, everyone = stats["subset_loss_C"].tolist(), 2**layer.E - 1
    best: dict[int, float] = {}
    for c in range(1, everyone + 1):
        best[c.bit_count()] = min(best.get(c.bit_count(), torch.inf), loss[c])
    # cost of the best chain from all experts down to a subset, and the one before it on the way
    cost, before = {everyone: 0.0}, {}
    for c in sorted(range(1, everyone), key=int.bit_count, reverse=True):
        if loss[c] < torch.inf:
            larger = [c | 1 << e for e in range(layer.E) if not c >> e & 1]
            before[c] = min(larger, key=cost.__getitem__)
            cost[c] = cost[before[c]] + loss[c] / max(best[c.bit_count()], 1e-30)
    at = min(cost, key=lambda c: (c.bit_count(), cost[c]))
    score_E = torch.full((layer.E,), float(layer.E), dtype=torch.float64)
    while at != everyone:
        goes = (before[at] & ~at).bit_length() - 1
        score_E[goes] = layer.E - 1 - at.bit_count()
        at = before[at]
    return score_E
