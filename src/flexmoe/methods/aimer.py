"""AIMER (arXiv 2603.18492): experts whose weights are flat go first; no data.

The paper's number is larger for flat weights (0.798 if they are Gaussian), and the largest are
removed: here it is negative, so that higher is to keep.
"""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics


@method("aimer", paper="AIMER, arXiv:2603.18492", unit="expert", router="remove")
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Minus mean magnitude over root mean square of all weights of the expert; no data."""
    matrices = [p.detach() for p in layer.parameters.values() if p.dim() == 3]
    number = sum(p[0].numel() for p in matrices)
    size_E, square_E = torch.zeros(2, layer.E, dtype=torch.float64)
    for e in range(layer.E):  # one at a time, as the sums are in float64
        for weight in (matrix[e].double() for matrix in matrices):
            size_E[e] += weight.abs().sum().cpu()
            square_E[e] += weight.square().sum().cpu()
    return -(size_E / number) / (square_E / number).sqrt()
