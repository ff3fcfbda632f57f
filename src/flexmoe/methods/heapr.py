"""HEAPr (arXiv 2509.22299): optimal brain surgeon score of a channel in the expert's output space.

In the cheap form: with f = W_down a, the derivative of the loss by activation a_j is the column
j of W_down times the gradient at f, so the paper's quadratic form with the H x H gradient
covariance is the mean squared gradient at a_j, and no covariance and no second pass are needed.
"""

from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("activation2_EI", when="forward")
def activation2(pairs: Pairs) -> Tensor:
    """Squared channel activation per routed token [S, I]."""
    return pairs.h_SI.float().square()


@statistic("gradient2_EI", when="backward")
def gradient2(pairs: Pairs) -> Tensor:
    """Squared gradient at the channel activation per routed token [S, I]."""
    assert pairs.grad_SI is not None
    return pairs.grad_SI.float().square()


@method(
    "heapr",
    paper="HEAPr, arXiv:2509.22299",
    needs=("activation2_EI", "gradient2_EI"),
    allocate="global",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Half the product of mean squared activation and mean squared gradient over routed tokens."""
    return 0.5 * stats.mean("activation2_EI") * stats.mean("gradient2_EI")
