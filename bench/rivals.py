"""What pruning papers do and flexmoe does not, written for this comparison on the package's seam:
`progressive` is the re-scoring loop, every step in the model as pruned so far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexmoe.experts import expert_layers
from flexmoe.methods import find_method, score_layers
from flexmoe.observe import observe
from flexmoe.pipeline import Ranked

Score = dict[int, Tensor]


def progressive(ranked: Ranked, method: str = "fisher", step: float = 0.1) -> Score:
    """Prune a step, score what is left in the pruned model, and again. The scores say in which
    order channels went."""
    chosen, layers = find_method(method), expert_layers(ranked.model)
    kept = {layer.index: layer.module.down_proj.detach().clone() for layer in layers}
    assert ranked.windows is not None
    order = {i: torch.zeros_like(s, dtype=torch.float64) for i, s in ranked.score.items()}
    gone = {i: torch.zeros_like(s, dtype=torch.bool) for i, s in ranked.score.items()}
    try:
        for stage in range(round(1 / step) - 1):
            statistics = observe(
                ranked.model, ranked.windows.ids, chosen.needs, batch_size=ranked.batch_size
            )
            score = score_layers(chosen, layers, statistics)
            flat = torch.cat([score[i].masked_fill(gone[i], math.inf).flatten() for i in score])
            here = flat.argsort(stable=True)
            place = torch.empty(len(flat), dtype=torch.float64)
            place[here] = torch.arange(len(flat), dtype=torch.float64) / len(flat)
            already = int(sum(g.sum() for g in gone.values()))
            going = torch.zeros(len(flat), dtype=torch.bool)
            going[here[: round(step * (stage + 1) * len(flat)) - already]] = True
            start = 0
            for layer in layers:
                i, n = layer.index, layer.E * layer.I
                place_EI = place[start : start + n].view(layer.E, layer.I)
                going_EI = going[start : start + n].view(layer.E, layer.I)
                start += n
                # later stages overwrite the place of what is still there
                order[i] = torch.where(gone[i], order[i], stage + place_EI)
                gone[i] |= going_EI
                down = layer.channel_major("down_proj", layer.module.down_proj.data)[0]
                down[gone[i]] = 0
    finally:
        for layer in layers:
            layer.module.down_proj.data.copy_(kept[layer.index])
    return order
