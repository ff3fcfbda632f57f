"""Training-free halving (arXiv 2609.04575): fewer experts, the weights of more.

Of a token's experts the best few are computed, with the weights that the router gave them among all
of them: the set that is normalised over is not the set that is computed. (The paper also normalises
over more experts than the model uses; the router says nothing of those.)
"""

from collections.abc import Sequence

from flexmoe.errors import FlexmoeError
from flexmoe.policies import LayerFacts, places, policy
from flexmoe.routing.edits import Routed


def whole(facts: Sequence[LayerFacts], number: float) -> list[float]:
    """The same number for every layer."""
    if number != int(number):
        raise FlexmoeError(f"policy 'halve:{number:g}': expected a whole number of experts")
    return [number] * len(facts)


@policy(
    "halve",
    paper="training-free halving, arXiv:2609.04575",
    argument="the experts of a token that are computed",
    most=None,
    fit=whole,
)
def rule(routed: Routed, facts: LayerFacts, number: float) -> Routed:
    """The best experts of a token only, weights as they are among all of them."""
    return routed.without(places(routed.weight_TK) >= number)
