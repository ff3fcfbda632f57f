"""Criteria of MC-Suite, "Finding Fantastic Experts in MoEs" (arXiv 2504.05586), one shot.

Three of its sixteen, whose formula and direction are clear; its usage frequency is frequency.py.
The paper drops one expert a layer, scores again, and so on, with a little training.
"""

from torch import Tensor

from flexmoe.around import router_rows
from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.methods.mone import variance
from flexmoe.statistics import LayerStatistics

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
