"""Published ways to choose what goes, written for this comparison on the seam of the package.

They are not part of flexmoe: `progressive` is the re-scoring loop that pruning papers use, `rco`
what RCO (arXiv 2605.00649, section 3: Gumbel masks, gradient projected on the budget surface,
retraction by bisection) becomes when its unit is a channel. RCO chooses for one budget at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flexmoe.experts import expert_layers, experts_function
from flexmoe.methods import find_method, score_layers
from flexmoe.pipeline import Ranked
from flexmoe.statistics import observe
from flexmoe.training import batches, divergence

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


def rco(
    ranked: Ranked,
    pruned: float,
    *,
    steps: int,
    batch_size: int,
    spread: float = 5.0,
    seed: int = 0,
) -> dict[int, Tensor]:
    """Masks [E, I] of one budget, learned on the calibration windows from the scores as a prior;
    two antithetic samples a step."""
    assert ranked.windows is not None
    layers = expert_layers(ranked.model)
    sizes = [layer.E * layer.I for layer in layers]
    total = sum(sizes)
    score = torch.cat([ranked.score[layer.index].flatten() for layer in layers])
    rank = torch.empty(total)
    rank[score.argsort()] = torch.linspace(0, 1, total)
    # one logit for "prune" against "keep", as two would only move against each other
    logit = torch.full((total,), math.log(pruned / (1 - pruned))) + spread * (0.5 - rank)
    logit = _retract(logit, pruned)
    mean, square = torch.zeros(total), torch.zeros(total)
    generator = torch.Generator().manual_seed(seed)
    going = round(pruned * total)
    ids = ranked.windows.ids
    ranked.model.requires_grad_(False)
    for step, batch in enumerate(batches(ids, batch_size, steps, seed)):
        tau = 0.05 ** (step / max(1, steps - 1))
        uniform = torch.rand(2, total, generator=generator).clamp(1e-9, 1 - 1e-7)
        gumbel = -torch.log(-torch.log(uniform))
        noise = gumbel[0] - gumbel[1]
        with torch.no_grad():
            teacher = ranked.model(input_ids=batch, use_cache=False).logits
        leaf = logit.clone().requires_grad_(True)
        grad = torch.zeros(total)
        for sign in (1.0, -1.0):
            noisy = leaf + sign * noise
            soft = torch.sigmoid(-noisy / tau)
            hard = torch.ones(total)
            hard[noisy.detach().topk(going).indices] = 0
            mask = hard + soft - soft.detach()
            for layer, part in zip(layers, mask.split(sizes), strict=True):
                layer.module.flexmoe_mask_EI = part.view(layer.E, layer.I)
            with experts_function(ranked.model, "flexmoe_mask"):
                student = ranked.model(input_ids=batch, use_cache=False).logits
                loss = divergence(student, teacher) / batch[:, 1:].numel()
                grad += torch.autograd.grad(loss, leaf)[0] / 2
        p = torch.sigmoid(logit)
        normal = p * (1 - p)
        grad -= (grad @ normal) / (normal @ normal) * normal
        mean, square = 0.9 * mean + 0.1 * grad, 0.999 * square + 0.001 * grad**2
        scale = (square / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8
        logit = _retract(logit - 0.1 * mean / (1 - 0.9 ** (step + 1)) / scale, pruned)
        p = torch.sigmoid(logit)
        normal = p * (1 - p)
        mean -= (mean @ normal) / (normal @ normal) * normal
    hard = torch.ones(total)
    hard[logit.topk(going).indices] = 0
    parts = zip(layers, hard.split(sizes), strict=True)
    return {layer.index: part.view(layer.E, layer.I) for layer, part in parts}


def _retract(logit: Tensor, pruned: float) -> Tensor:
    """Shift all logits so that the expected pruned share is exact."""
    low, high = -50.0, 50.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(torch.sigmoid(logit + middle).mean()) > pruned:
            high = middle
        else:
            low = middle
    return logit + (low + high) / 2
