"""Random order of whole experts: the floor of expert pruning."""

import torch
from torch import Tensor

from flexmoe.experts import ExpertLayer
from flexmoe.methods import method
from flexmoe.statistics import LayerStatistics


@method("random-experts", paper="baseline", unit="expert", router="remove")
def score(layer: ExpertLayer, stats: LayerStatistics) -> Tensor:
    """A uniform random number an expert, from the seed of the run and the layer's number."""
    generator = torch.Generator().manual_seed(stats.seed * 100_003 + layer.index)
    return torch.rand(layer.E, generator=generator, dtype=torch.float64)
