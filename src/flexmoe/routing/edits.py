"""The seam between router and experts: what the router said can be changed before experts compute.

A router gives every token K experts and their weights. An edit is a pure function of these; the
experts function registered here applies a module's edits and computes what is left, at the widths
of its budget.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flexmoe.experts import expert_layers, prefix_forward


@dataclass(frozen=True)
class Routed:
    """What a router said of a batch: ``index_TK`` the experts of every token and ``weight_TK``
    their weights, not always the largest first. A pair with index ``E``, the number of experts, is
    skipped: it computes nothing and adds nothing."""

    index_TK: Tensor
    weight_TK: Tensor
    E: int

    def without(self, gone_TK: Tensor) -> Routed:
        """The same without these pairs."""
        return Routed(self.index_TK.masked_fill(gone_TK, self.E), self.weight_TK, self.E)


Edit = Callable[[Routed], Routed]


@dataclass
class Work:
    """What the experts of a layer computed, of ``full`` channels each: ``pairs`` of a token and an
    expert, and ``channels`` of them; of ``routed`` pairs that the router asked for."""

    full: int
    pairs: int = 0
    channels: int = 0
    routed: int = 0

    def add(self, width_TK: Tensor, routed: int) -> None:
        """Count a batch by the widths of its pairs, 0 for those that are skipped."""
        self.pairs += int((width_TK > 0).sum())
        self.channels += int(width_TK.sum())
        self.routed += routed


def edited_forward(module: nn.Module, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Registered as ``flexmoe_edited``: what the router said is changed by the router rule
    (``module.flexmoe_renumber``) and the policy (``module.flexmoe_policy``) where there is one,
    then the experts compute at the widths ``module.flexmoe_width_E``. Pairs with an expert of width
    0 give ``module.flexmoe_constant_EH`` where there is one."""
    width_E: list[int] = module.flexmoe_width_E
    routed = Routed(index_TK, weight_TK, len(width_E))
    for name in ("flexmoe_renumber", "flexmoe_policy"):
        edit: Edit | None = getattr(module, name, None)
        routed = routed if edit is None else edit(routed)
    width_X = torch.tensor([*width_E, 0], device=x_TH.device)  # of a skipped pair 0
    width_TK = width_X[routed.index_TK]
    work: Work = module.flexmoe_work
    work.add(width_TK, index_TK.numel())
    constant_EH: Tensor | None = getattr(module, "flexmoe_constant_EH", None)
    if constant_EH is None:
        return prefix_forward(module, x_TH, routed.index_TK, routed.weight_TK)
    gone_TK = (width_TK == 0) & (routed.index_TK < routed.E)
    share_TK = (routed.weight_TK * gone_TK).to(constant_EH.dtype)
    rows_TKH = constant_EH.to(x_TH.device)[routed.index_TK.masked_fill(~gone_TK, 0)]
    added_TH = torch.einsum("tk,tkh->th", share_TK, rows_TKH).to(x_TH.dtype)
    routed = routed.without(gone_TK)
    return added_TH + prefix_forward(module, x_TH, routed.index_TK, routed.weight_TK)


EDITED = "flexmoe_edited"
ALL_EXPERTS_FUNCTIONS.register(EDITED, edited_forward)

EDITS = ("flexmoe_renumber", "flexmoe_policy", "flexmoe_constant_EH")


def is_edited(module: nn.Module) -> bool:
    """Whether something changes what the router says to this experts module."""
    return any(getattr(module, name, None) is not None for name in EDITS)


def choose_function(model: PreTrainedModel) -> None:
    """Run the experts through the function that their widths and edits ask for: at full width
    without edits the one that the model came with."""
    if not hasattr(model, "flexmoe_stock"):
        model.flexmoe_stock = model.get_experts_implementation()
    full, edited = True, False
    for layer in expert_layers(model):
        module = layer.module
        width_E = module.__dict__.setdefault("flexmoe_width_E", [layer.I] * layer.E)
        full = full and min(width_E) == layer.I
        edited = edited or is_edited(module)
        module.flexmoe_work = Work(layer.I)
    pruned = EDITED if edited else "flexmoe"
    model.set_experts_implementation(model.flexmoe_stock if full and not edited else pruned)
