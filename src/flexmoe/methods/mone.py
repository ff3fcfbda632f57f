"""MoNE (arXiv 2507.00390): experts that are rarely used and always say the same can be a constant.

The authors' code estimates the variance on the fly, from the second batch on and with the mean so
far; here it is the variance over all tokens, which no batch size changes. Usage is divided by all
tokens, as in the code (the paper reads: by those of the expert). Replacing experts by constants is
a matter of the export; the score is the same.
"""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics, Pairs, statistic


@statistic("output_EH", when="forward")
def output(pairs: Pairs) -> Tensor:
    """The expert's output, of every pair [S, H]."""
    return pairs.y_SH.float()


@statistic("output2_EH", when="forward")
def output2(pairs: Pairs) -> Tensor:
    """Its square [S, H]."""
    return pairs.y_SH.float().square()


def variance(stats: LayerStatistics) -> Tensor:
    """Variance [E, H] of every entry of an expert's output over its tokens; 0 for a single one."""
    count_E1 = stats["count_E"][:, None]
    spread = stats["output2_EH"] - stats["output_EH"].square() / count_E1.clamp_min(1)
    return torch.where(count_E1 > 1, spread.clamp_min(0) / (count_E1 - 1).clamp_min(1), 0)


@method(
    "mone",
    paper="MoNE, arXiv:2507.00390",
    needs=("weight_E", "output_EH", "output2_EH"),
    unit="expert",
    router="constant",
)
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Norm of the output's standard deviation x routing weight per token of the text."""
    return variance(stats).sum(1).sqrt() * stats["weight_E"] / max(stats.tokens, 1)
