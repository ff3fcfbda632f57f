"""Criteria of MC-Suite, "Finding Fantastic Experts in MoEs" (arXiv 2504.05586), one shot.

Those of the paper's sixteen that look at what goes by at inference, whose formula is clear, and the
norm of the router's rows; its usage frequency is frequency.py. The paper drops one expert a layer,
scores again, and so on, with a little training.
"""

import torch
from torch import Tensor

from flexmoe.around import router_rows
from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.methods.mone import variance
from flexmoe.statistics import LayerStatistics, Pairs, statistic

PAPER = "MC-Suite, arXiv:2504.05586"


@method("mc-router", paper=f"{PAPER} (RWN)", unit="expert", router="remove")
def router_norm(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Minus the norm of the expert's router row: the largest goes first; no data."""
    return -router_rows(layer).norm(dim=1)


@method("mc-norm", paper=f"{PAPER} (EAN)", needs=("output2_EH",), unit="expert", router="remove")
def output_norm(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Sum over hidden dimensions of the norm over tokens of the expert's output."""
    return stats["output2_EH"].sqrt().sum(1)


@method(
    "mc-entropy",
    paper=f"{PAPER} (EAE)",
    needs=("output_EH", "output2_EH"),
    unit="expert",
    router="remove",
)
def output_entropy(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Sum over hidden dimensions of the logarithm of the output's standard deviation."""
    return variance(stats).sqrt().clamp_min(1e-12).log().sum(1)


@statistic("together_EE", when="batch")
def together(pairs: Pairs) -> Tensor:
    """Tokens that are sent to both of two experts [E, E]; to one of them on the diagonal."""
    assert pairs.layer is not None
    index_TK = pairs.all.index_TK
    sent_TE = torch.zeros(len(index_TK), pairs.layer.E, device=index_TK.device)
    sent_TE.scatter_(1, index_TK, 1.0)
    return sent_TE.T @ sent_TE


@statistic("vocabulary_EV", when="batch", merge="max", reads=("ids",))
def vocabulary(pairs: Pairs) -> Tensor:
    """1 where a token of the vocabulary was ever sent to the expert [E, V]."""
    assert pairs.layer is not None and pairs.layer.model is not None
    V = pairs.layer.model.config.get_text_config().vocab_size
    routing = pairs.all.routing
    flat_S = routing.expert_S * V + pairs.ids_T[routing.token_S]
    seen_X = torch.zeros(pairs.layer.E * V, dtype=torch.uint8, device=flat_S.device)
    return seen_X.index_fill_(0, flat_S, 1).view(-1, V)


@method(
    "mc-collaboration",
    paper=f"{PAPER} (ECC)",
    needs=("together_EE",),
    unit="expert",
    router="remove",
)
def collaboration(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Tokens that the expert shares with the one it works with most: who has no partner goes."""
    return stats["together_EE"].clone().fill_diagonal_(0).amax(1)


@method(
    "mc-vocabulary",
    paper=f"{PAPER} (EVTC)",
    needs=("vocabulary_EV",),
    unit="expert",
    router="remove",
)
def coverage(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Number of different tokens of the vocabulary that the expert is sent."""
    return stats["vocabulary_EV"].sum(1)


@method(
    "mc-overlap", paper=f"{PAPER} (ETS)", needs=("vocabulary_EV",), unit="expert", router="remove"
)
def overlap(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Minus the mean share of its vocabulary in common with each other expert (Jaccard)."""
    seen_EV = stats["vocabulary_EV"].float()
    both_EE = (seen_EV @ seen_EV.T).double()
    size_E = both_EE.diagonal()
    share_EE = both_EE / (size_E[:, None] + size_E - both_EE).clamp_min(1)
    mean_E = (share_EE.sum(1) - share_EE.diagonal()) / (layer.E - 1)
    return -mean_E.masked_fill(size_E == 0, 1.0)  # who is sent nothing adds nothing
