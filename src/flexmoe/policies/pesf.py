"""PESF of EAC-MoE (arXiv 2508.01625): experts that a sequence hardly uses are skipped for it.

Of a sequence of l tokens an expert gets l K / E on average; one that gets less than alpha times
that is skipped for the whole sequence. It counts the tokens of the sequence that runs now, without
padding, so it is of prompts, not of single tokens. Weights of the others are normalised where the
router does.
"""

import torch

from flexmoe.policies import LayerFacts, policy
from flexmoe.routing.edits import Routed


@policy(
    "pesf",
    paper="EAC-MoE, arXiv:2508.01625 (PESF)",
    argument="alpha, the paper's are 0.3 and 0.7",
    default=0.3,
)
def rule(routed: Routed, facts: LayerFacts, number: float) -> Routed:
    """Experts that at least alpha times the average number of the sequence's pairs choose."""
    T, K = routed.index_TK.shape
    rows = facts.batch.sequences if T % facts.batch.sequences == 0 else 1
    index_nS, real_T = routed.index_TK.view(rows, -1), facts.batch.real_T
    real_nS = torch.ones_like(index_nS, dtype=torch.float32)
    if real_T is not None and len(real_T) == T:
        real_nS *= real_T.to(index_nS.device).repeat_interleave(K).view(rows, -1)
    count_nE = real_nS.new_zeros(rows, routed.E + 1).scatter_add(1, index_nS, real_nS)
    enough_nE = count_nE >= number * real_nS.sum(1, keepdim=True) / routed.E
    keep_TK = enough_nE.gather(1, index_nS).view(T, K)
    keep_TK |= ~keep_TK.any(1, keepdim=True)  # a token of rare experts alone keeps its own
    return facts.keep(routed, keep_TK)
