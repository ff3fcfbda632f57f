"""Training-free halving (arXiv 2609.04575): fewer experts, the weights of more.

Of a token's experts the best few are computed, with weights that are normalised over another set:
by default all that the router chose, or as many of the largest as the second number says, also more
than the model uses (the paper's best).
"""

from collections.abc import Sequence

from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.policies import LayerFacts, places, policy
from flexmoe.routing.edits import Routed

CLOSE = 0.02  # how far routing weights may lie from the router's own shares of a token


def whole(facts: Sequence[LayerFacts], number: float) -> list[float]:
    """The same number for every layer."""
    if number != int(number):
        raise FlexmoeError(f"policy 'halve:{number:g}': expected a whole number of experts")
    return [number] * len(facts)


def mass(routed: Routed, logits_TE: Tensor, number: int) -> Tensor:
    """What a token's experts have of the router's probability, over what ``number`` experts have
    [T, 1]: the likeliest of those that the router chose, and then of the others. Probabilities are
    the softmax or the sigmoid of its logits, whichever its weights are in proportion to."""
    weight_TK = routed.weight_TK.float()
    weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp_min(1e-20)
    for score_TE in (logits_TE.softmax(1), logits_TE.sigmoid()):
        own_TK = score_TE.gather(1, routed.index_TK)
        own_T1 = own_TK.sum(1, keepdim=True)
        if bool(((own_TK / own_T1 - weight_TK).abs() < CLOSE).all()):
            others_TE, K = score_TE.scatter(1, routed.index_TK, 0), routed.index_TK.shape[1]
            found_T1 = own_TK.topk(min(number, K)).values.sum(1, keepdim=True)
            return own_T1 / (
                found_T1 + others_TE.topk(max(0, number - K)).values.sum(1, keepdim=True)
            )
    raise FlexmoeError(
        "policy 'halve' with a second number reads the router's probabilities, and this model's "
        "weights are neither the softmax nor the sigmoid of its logits: leave the second one out"
    )


@policy(
    "halve",
    paper="training-free halving, arXiv:2609.04575",
    argument="the experts of a token that are computed",
    most=None,
    fit=whole,
    second="how many experts the weights are normalised over, by default those of a token",
)
def rule(routed: Routed, facts: LayerFacts, number: float) -> Routed:
    """The best experts of a token only, weights as they are among all of them, or among more."""
    weight_TK = routed.weight_TK
    if facts.second is not None:
        assert facts.around is not None
        logits_TE = facts.around.logits_TE(len(weight_TK)).to(weight_TK.device)
        weight_TK = weight_TK * mass(routed, logits_TE, int(facts.second)).to(weight_TK.dtype)
    few = Routed(routed.index_TK, weight_TK, routed.E)
    return few.without(places(routed.weight_TK) >= number)
