"""Random scores: the floor that every other method has to beat."""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics


@method("random", paper="baseline", allocate="layer")
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """Uniform random numbers from the seed of the run and the layer's number; no data."""
    generator = torch.Generator().manual_seed(stats.seed * 100_003 + layer.index)
    return torch.rand(layer.E, layer.I, generator=generator, dtype=torch.float64)
