"""Top-any, the online form of MC# (arXiv 2510.10962) without its training.

MC# trains a small router that says how many of a token's experts are computed, the best ones first.
Here the number is the smallest whose routing weights reach a share of all of the token's, as an
untrained stand-in with the same form: a prefix of the token's experts, weights normalised over it.
"""

from flexmoe.policies import LayerFacts, places, policy
from flexmoe.routing.edits import Routed


@policy(
    "top-any",
    paper="MC#, arXiv:2510.10962 (untrained)",
    argument="the share of a token's routing weight to reach, such as 0.9",
)
def rule(routed: Routed, facts: LayerFacts, number: float) -> Routed:
    """The best experts of a token until their routing weights reach a share of all of its."""
    ordered_TK = routed.weight_TK.float().sort(dim=1, descending=True, stable=True).values
    before_TK = ordered_TK.cumsum(1) - ordered_TK
    needed_T1 = (before_TK < number * ordered_TK.sum(1, keepdim=True)).sum(1, keepdim=True)
    return facts.keep(routed, places(routed.weight_TK) < needed_T1)
