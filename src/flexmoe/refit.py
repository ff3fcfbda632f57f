"""Closed-form recovery of a family: new down projections for all budgets at once, no gradients.

Ranked channels h [I] of an expert, its down projection W (columns W_j), routing weight r. The
member at budget b computes the first w_b channels only. One W' serves all members, so it minimises

    sum_b p_b sum_tokens r^2 |W h - W'[:, :w_b] h[:w_b]|^2  +  damping |W' - W|^2

With second moments C = sum_tokens r^2 h h^T, q_i = sum of p_b over the budgets that keep channel i
(never rising with i) and D = W' - W, the zero of its gradient is one linear system an expert:

    (C_ij min(q_i, q_j) + damping) D_j = (C_ij max(q_i - q_j, 0)) W_j        (summed over j)

The right side is what budgets without channel j miss of it, as seen by a channel i they keep. The
fit is to each expert's own output. Biases stay, and a norm after the experts is not seen.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flexmoe.errors import FlexmoeError
from flexmoe.experts import (
    Enough,
    ExpertLayer,
    Routing,
    expert_layers,
    experts_function,
    unchanged,
)
from flexmoe.memory import free_memory
from flexmoe.plan import Plan
from flexmoe.progress import Steps, Track, silent

FULL = 3.0  # weight of the unpruned member beside all others together, see docs/log.md
DAMPING = 1.0  # the old weights count like DAMPING * I tokens more that voted for them


@dataclass(frozen=True)
class RefitReport:
    """What `refit` did, on the calibration data.

    ``before`` and ``after`` [B]: squared error of the experts' outputs at each budget of the plan
    relative to their squared size, the mean over layers. ``step`` by layer: the share of the
    fitted change that was made (less than 1 where all of it would have made a budget worse).
    ``alone`` by layer: experts that are cut somewhere and keep their weights all the same, for
    they saw no token or (without damping) too few.
    """

    budgets: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]
    step: dict[int, float]
    alone: dict[int, list[int]]
    passes: int
    seconds: float


class Moments:
    """Second moments of the channels of one layer: ``sum_EII`` float32 of r^2 h h^T, ``count_E``
    tokens. As an observer (see `observe_forward`) it adds up what goes by."""

    def __init__(self, layer: ExpertLayer, last: bool):
        device = layer.module.down_proj.device
        self.sum_EII = torch.zeros(layer.E, layer.I, layer.I, device=device)
        self.count_E = torch.zeros(layer.E, dtype=torch.long, device=device)
        self.last = last

    def __call__(self, routing: Routing, h_SI: Tensor) -> Tensor:
        weighted_SI = h_SI.float() * routing.weight_S.float()[:, None]
        for (e, a, b), x_nI in zip(routing.segments, routing.split(weighted_SI), strict=True):
            self.sum_EII[e].addmm_(x_nI.mT, x_nI)
            self.count_E[e] += b - a
        if self.last:
            raise Enough
        return h_SI


def refit(
    model: nn.Module,
    plan: Plan,
    ids: Tensor,
    *,
    weights: Sequence[float] | None = None,
    damping: float = DAMPING,
    batch_size: int = 8,
    memory: int | None = None,
    track: Track = silent,
) -> RefitReport:
    """Refit the down projections of a *ranked* model to all budgets of ``plan``, in place.

    ``ids`` [n, t] calibration windows. At every budget that cuts a layer, the summed squared error
    of the outputs of its experts on these windows, at the inputs of the unpruned model, does not
    rise (up to rounding to the model's dtype); that of the unpruned member rises from zero to a
    little. ``weights`` [B] how much each budget counts: the error at b > 0 by weights[b] over the
    root of that error before, the error at 0 by weights[0] over all of these together; default
    (3, 1, 1, ...). ``memory``: bytes for moments (4*E*I*I a layer, at least one layer; by default
    half of what is free on the model's device). What does not fit at once takes more passes, last
    layers first, so that all see the original model and the result is the same.
    """
    start = time.perf_counter()
    layers = expert_layers(model)
    plan.check_fits(model.config.model_type, {layer.index: layer.shape for layer in layers})
    weight_B = budget_weights(weights, plan.budgets)
    if not damping >= 0:
        raise FlexmoeError(f"damping must not be negative, found {damping:g}")
    if memory is None:
        memory = free_memory(layers[0].module.down_proj.device) // 2
    groups = _groups(layers, memory)
    device = next(model.parameters()).device
    batches = [(group, batch) for group in groups for batch in ids.split(batch_size)]
    moments: dict[int, Moments] = {}
    error_LB2, step, alone = [], {}, {}
    with torch.no_grad(), experts_function(model, "flexmoe_observe"):
        for at in track(Steps(0, len(batches), batch_size * ids.shape[1]), "refit"):
            group, batch = batches[at]
            if not moments:
                moments = {layer.index: Moments(layer, layer is group[-1]) for layer in group}
            _pass(model, layers, moments, batch.to(device))
            if at + 1 < len(batches) and batches[at + 1][0] is group:
                continue
            for layer in group:
                found = moments.pop(layer.index)
                width_BE = plan.width[layer.index]
                error_B2, step[layer.index], kept = refit_layer(
                    layer, found, width_BE, weight_B, damping
                )
                error_LB2.append(error_B2)
                if kept:
                    alone[layer.index] = kept
    before_B, after_B = torch.stack(error_LB2).mean(0).unbind(1)
    return RefitReport(
        budgets=plan.budgets,
        before=tuple(before_B.tolist()),
        after=tuple(after_B.tolist()),
        step=dict(sorted(step.items())),
        alone=dict(sorted(alone.items())),
        passes=len(groups),
        seconds=time.perf_counter() - start,
    )


def budget_weights(weights: Sequence[float] | None, budgets: Sequence[float]) -> Tensor:
    """``weights`` [B] as float64, or the default ones; a `FlexmoeError` if they cannot be used."""
    if weights is None:
        weights = [FULL] + [1.0] * (len(budgets) - 1)
    if len(weights) != len(budgets) or not all(0 <= w < float("inf") for w in weights):
        raise FlexmoeError(
            f"expected {len(budgets)} weights, none negative, one for each of the budgets "
            f"{list(budgets)}, found {list(weights)}"
        )
    return torch.tensor(weights, dtype=torch.float64)


def _groups(layers: Sequence[ExpertLayer], memory: int) -> list[list[ExpertLayer]]:
    """Neighbouring layers whose moments fit into ``memory`` bytes together; last layers first."""
    groups: list[list[ExpertLayer]] = []
    left = 0
    for layer in reversed(layers):
        needed = 4 * layer.E * layer.I * layer.I
        if not groups or needed > left:
            groups.append([])
            left = memory
        groups[-1].insert(0, layer)
        left -= needed
    return groups


def _pass(
    model: nn.Module, layers: Sequence[ExpertLayer], moments: dict[int, Moments], batch: Tensor
) -> None:
    """Run one batch as far as the last layer of ``moments``, unpruned, and add up."""
    for layer in layers:
        layer.module.flexmoe_observer = moments.get(layer.index, unchanged)
    try:
        model(input_ids=batch, use_cache=False)
    except Enough:
        pass
    finally:
        for layer in layers:
            del layer.module.flexmoe_observer


def refit_layer(
    layer: ExpertLayer, moments: Moments, width_BE: Tensor, weight_B: Tensor, damping: float
) -> tuple[Tensor, float, list[int]]:
    """Refit the experts of one layer in place.

    Returns the layer's squared error [B, 2] before and after relative to its output's square, the
    share of the step made, and the experts left alone. The solve is float64, one expert at a time.
    """
    view_EIH = layer.channel_major("down_proj", layer.module.down_proj.data)[0]
    if not torch.isfinite(moments.sum_EII).all():
        raise FlexmoeError(
            f"the activations of layer {layer.index} on the calibration data are not finite: "
            "check that the tokenizer belongs to the model, or run in float32"
        )
    device = view_EIH.device  # float64 is there on the CPU and on CUDA
    device = device if device.type in ("cpu", "cuda") else torch.device("cpu")
    width_BE, weight_B = width_BE.to(device), weight_B.to(device)
    rank_I = torch.arange(layer.I, device=device)

    def load(e: int) -> tuple[Tensor, Tensor, Tensor]:
        keep_BI = (rank_I < width_BE[:, e, None]).double()
        sum_II = moments.sum_EII[e].to(device, torch.float64)
        return keep_BI, sum_II, view_EIH[e].to(device, torch.float64)

    size, error_B = weight_B.new_zeros(()), torch.zeros_like(weight_B)
    for e in range(layer.E):
        keep_BI, sum_II, down_IH = load(e)
        energy_II = sum_II * (down_IH @ down_IH.mT)  # of every two channels in the output
        size = size + energy_II.sum()
        error_B += _block(1 - keep_BI, energy_II, 1 - keep_BI)
    p_B = torch.where(error_B > 0, weight_B * error_B.clamp_min(1e-300).rsqrt(), 0.0)
    p_B[0] = weight_B[0] * p_B[1:].sum() if len(p_B) > 1 else weight_B[0]

    gain_B, cost_B = torch.zeros_like(error_B), torch.zeros_like(error_B)
    change: dict[int, Tensor] = {}
    alone = []
    for e in range(layer.E):
        keep_BI, sum_II, down_IH = load(e)
        count = int(moments.count_E[e])
        if (width_BE[:, e] == layer.I).all():
            continue
        relative = damping * layer.I / max(count, 1)
        change_IH = solve_expert(sum_II, down_IH, p_B @ keep_BI, relative) if count else None
        if change_IH is None:
            alone.append(e)
            continue
        # error of W + s D at budget b: error_b - 2 s gain_b + s^2 cost_b
        gain_B += _block(keep_BI, sum_II * (change_IH @ down_IH.mT), 1 - keep_BI)
        cost_B += _block(keep_BI, sum_II * (change_IH @ change_IH.mT), keep_BI)
        change[e] = change_IH.float()
    cut_B = (error_B > 0) & (cost_B > 0)  # others compute what the unpruned member does
    limit_B = torch.where(cut_B, (2 * gain_B / cost_B.clamp_min(1e-300)).clamp(0, 1), 1.0)
    step = float(limit_B.min())
    if step > 0:
        for e, change_IH in change.items():
            view_EIH[e] = (view_EIH[e].float() + step * change_IH.to(view_EIH.device)).to(
                view_EIH.dtype
            )
    after_B = error_B - 2 * step * gain_B + step**2 * cost_B
    return (torch.stack([error_B, after_B], 1) / size.clamp_min(1e-300)).cpu(), step, alone


def solve_expert(sum_II: Tensor, down_IH: Tensor, q_I: Tensor, damping: float) -> Tensor | None:
    """The change D [I, H] of one expert's down projection (see above), all float64; ``damping`` is
    relative to the mean diagonal. None if the system is singular."""
    n = int((q_I > 0).sum())  # channels that count anywhere are a prefix
    if not n:
        return torch.zeros_like(down_IH)
    matrix_nn = sum_II[:n, :n] * torch.minimum(q_I[:n, None], q_I[:n])
    matrix_nn.diagonal().add_(damping * matrix_nn.diagonal().mean())
    factor_nn, failed = torch.linalg.cholesky_ex(matrix_nn)
    if failed:
        return None
    missed_nH = (sum_II[:n] * (q_I[:n, None] - q_I).clamp_min(0)) @ down_IH
    change_IH = torch.zeros_like(down_IH)
    change_IH[:n] = torch.cholesky_solve(missed_nH, factor_nn)
    return change_IH


def _block(left_BI: Tensor, square_II: Tensor, right_BI: Tensor) -> Tensor:
    """Sum of a matrix over the rows and columns that each budget marks [B]."""
    return ((left_BI @ square_II) * right_BI).sum(1)
