"""NAEE's dynamic skipping (arXiv 2402.14800, section 3.3): an expert that says little is skipped.

The paper is of two experts a token: the second is skipped where its weight is less than beta times
the first's, beta of each layer the median of that ratio over calibration tokens. With more experts
a token every one but the first is measured so, by the median of all their ratios.
"""

from collections.abc import Sequence

from flexmoe.policies import LayerFacts, policy
from flexmoe.routing.edits import Routed


def thresholds(facts: Sequence[LayerFacts], quantile: float) -> list[float]:
    """Beta of every layer: a quantile of the ratios, the paper's is 0.5."""
    ratios = [f.weight_NK[:, 1:] / f.weight_NK[:, :1] for f in facts]
    return [
        float(ratio_NK.flatten().quantile(quantile)) if ratio_NK.numel() else 0.0
        for ratio_NK in ratios
    ]


@policy(
    "naee-skip",
    paper="NAEE, arXiv:2402.14800 (dynamic skipping)",
    argument="the share of calibration pairs under the threshold",
    default=0.5,
    fit=thresholds,
)
def rule(routed: Routed, facts: LayerFacts, number: float) -> Routed:
    """Experts whose routing weight is at least beta times the token's largest."""
    largest_T1 = routed.weight_TK.amax(1, keepdim=True)
    return facts.keep(routed, routed.weight_TK >= number * largest_T1)
