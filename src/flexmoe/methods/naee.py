"""NAEE, "Not All Experts are Equal" (arXiv 2402.14800): try every subset of a layer's experts.

The loss of a subset is the distance between the layer's output and its output when the router may
choose from the subset only; as in the authors' code it is a norm for each batch, added up, so that
the batch size matters a little. They take the best subset of one size. Members of a family must be
nested, so here it is the chain of subsets, one expert fewer each time, whose losses over those of
the best of their size add up to the least.

Their progressive form is `--sequential SHARE` with `--router remove`: layers before are pruned at
the share, and the distance is to what the layer gives in the unpruned model.
"""

import itertools

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, full_width_forward
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic

SAME = 1e-3  # relative: the router as it is rebuilt here against the model's own, but for rounding
TIED = 1e-5  # relative: of probabilities that lie so near the model may have chosen either


@statistic("subset_loss_C", when="batch", reads=("router", "target"), whole=True)
def subset_loss(pairs: Pairs) -> Tensor:
    """Norm of the change of the layer's output for every subset (bit e: expert e is kept); infinite
    for those with too few experts to choose from [C]."""
    seen, layer = pairs.all, pairs.layer
    assert layer is not None
    K, E = seen.index_TK.shape[1], layer.E
    one_T1 = torch.ones_like(seen.index_TK[:, :1])
    y_TEH = torch.stack(
        [
            full_width_forward(
                layer.module, seen.x_TH, e * one_T1, one_T1.to(seen.x_TH), lambda _, h_SI: h_SI
            )
            for e in range(E)
        ],
        1,
    )
    off_T = (seen.weight_TK.float().sum(1) - 1).abs()
    sums_to_one = bool((off_T <= max(1e-5, torch.finfo(seen.weight_TK.dtype).eps)).all())
    share_TE, index_TK = pairs.logits_TE.double().softmax(1), seen.index_TK.long()
    weight_TK = share_TE.gather(1, index_TK)
    others_T = share_TE.scatter(1, index_TK, 0).amax(1)
    largest = bool((weight_TK.amin(1) >= (1 - TIED) * others_T).all())
    if sums_to_one:
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
    rebuilt_TH = (weight_TK[:, :, None] * y_TEH.take_along_dim(index_TK[:, :, None], 1)).sum(1)
    out_TH, same = seen.out_TH.double(), max(SAME, torch.finfo(seen.out_TH.dtype).eps)
    if not (largest and float((out_TH - rebuilt_TH).norm()) <= same * float(out_TH.norm())):
        raise FlexmoeError(
            f"layer {layer.index}: naee routes anew among fewer experts, which it knows how to do "
            "for routers that take the largest of a softmax; this model's is another one"
        )
    return Subsets(E, K, sums_to_one, one_T1.device).change(
        share_TE, y_TEH, pairs.target_TH.double()
    )


class Subsets:
    """All subsets of E experts, for tokens that each choose the K best of what is kept.

    A token can only choose so many sets of K experts, far fewer than there are subsets. So the
    change of its output is computed for those, by the ranks of their experts in its own order, and
    looked up for the subsets.
    """

    def __init__(self, E: int, K: int, sums_to_one: bool, device: torch.device):
        self.E, self.sums_to_one = E, sums_to_one
        rank_E = torch.arange(E, device=device)
        kept_CE = torch.arange(2**E, device=device)[:, None] >> rank_E & 1
        first_CE = kept_CE * (kept_CE.cumsum(1) <= K)
        code_C = (first_CE << rank_E).sum(1)
        self.enough_C = kept_CE.sum(1) >= K
        code_S = code_C[self.enough_C].unique()  # sorted
        self.choice_C = torch.searchsorted(code_S, code_C).clamp_max(len(code_S) - 1)
        self.choice_SK = (code_S[:, None] >> rank_E & 1).nonzero()[:, 1].view(-1, K)

    def change(self, share_TE: Tensor, y_TEH: Tensor, from_TH: Tensor) -> Tensor:
        """Norm of ``from_TH`` less the output of each subset [C], of the experts' outputs ``y_TEH``
        and the router's softmax ``share_TE``; computed in float64."""
        at_once = max(1, 2**22 // 2**self.E)
        parts = zip(*(t.split(at_once) for t in (share_TE, y_TEH, from_TH)), strict=True)
        square_C = torch.stack([self._squares(*part) for part in parts]).sum(0)
        return square_C.clamp_min(0).sqrt().masked_fill(~self.enough_C, torch.inf)

    def _squares(self, share_TE: Tensor, y_TEH: Tensor, from_TH: Tensor) -> Tensor:
        """Sum over tokens of |from - y / Z|^2 = |from|^2 - 2 (from y) / Z + (y y) / Z^2, where y is
        the sum of the chosen experts' outputs times their shares, and Z what they are divided by:
        the shares of the chosen experts, or of all that are kept."""
        order_TE = share_TE.argsort(1, descending=True)
        sorted_TE = share_TE.gather(1, order_TE)
        y_TEH = y_TEH.take_along_dim(order_TE[:, :, None], 1) * sorted_TE[:, :, None]
        chosen = self.choice_SK.unbind(1)
        along_TE, gram_TEE = (y_TEH @ from_TH[:, :, None])[:, :, 0], y_TEH @ y_TEH.mT
        along_TS = torch.stack([along_TE[:, a] for a in chosen]).sum(0)
        across_TS = torch.zeros_like(along_TS)
        for a, b in itertools.product(chosen, repeat=2):
            across_TS += gram_TEE[:, a, b]
        choice_TC = self.choice_C[self._sums_of_kept(1 << order_TE.argsort(1))]
        if self.sums_to_one:
            z_TS = torch.stack([sorted_TE[:, a] for a in chosen]).sum(0)
            square_TC = (across_TS / z_TS**2 - 2 * along_TS / z_TS).gather(1, choice_TC)
        else:
            z_TC = self._sums_of_kept(share_TE).clamp_min(torch.finfo(torch.float64).tiny)
            square_TC = across_TS.gather(1, choice_TC) / z_TC**2
            square_TC -= 2 * along_TS.gather(1, choice_TC) / z_TC
        return from_TH.square().sum() + square_TC.sum(0)

    def _sums_of_kept(self, value_TE: Tensor) -> Tensor:
        """Sum of the values of the experts that each subset keeps [T, C]: of the lower half of the
        experts plus of the upper half."""
        halves = []
        for value_TF in value_TE.tensor_split([self.E // 2], 1):
            F = value_TF.shape[1]
            bit_F = torch.arange(F, device=value_TE.device)
            kept_CF = torch.arange(2**F, device=value_TE.device)[:, None] >> bit_F & 1
            halves.append((value_TF[:, None] * kept_CF).sum(2))
        return (halves[1][:, :, None] + halves[0][:, None]).flatten(1)


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
