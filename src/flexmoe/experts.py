"""The seam: one view of every fused experts module, and the functions flexmoe registers there.

transformers sends each fused experts module through one registry as
``fn(module, hidden_TH, index_TK, weight_TK) -> TH``, with layout flags on the module. Everything
in flexmoe that touches expert weights or activations goes through this file, so no architecture
needs a table, a hook or a patched modelling file.

Shape letters, here and everywhere: ``L`` MoE layers, ``E`` experts, ``I`` channels of an expert,
``H`` hidden, ``T`` tokens, ``K`` experts per token, ``S = T*K`` routed pairs, ``V`` vocabulary,
``B`` budgets, ``A`` actions, ``N`` blocks of an expert (a quantum of channels each), ``w`` a width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flexmoe.errors import FlexmoeError
from flexmoe.kernels import experts
from flexmoe.kernels.routing import Routing
from flexmoe.sharding import own_rows
from flexmoe.storage import STORAGE, stored_weights, table

LAYOUT_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "has_post_expert_norm")
SINCE_5_20 = "has_post_expert_norm"  # false where transformers is older


@dataclass(frozen=True)
class LayerShape:
    """Counts of one MoE layer. ``channel_parameters`` counts gate, up and down (and their biases)
    of one channel; ``fixed_parameters`` what an expert keeps at every width (its down bias)."""

    experts: int
    channels: int
    hidden: int
    channel_parameters: int
    fixed_parameters: int

    @property
    def parameters(self) -> int:
        """Routed-expert parameters of the layer at full width."""
        return self.experts * (self.channels * self.channel_parameters + self.fixed_parameters)


class ExpertLayer:
    """Uniform view of one fused experts module at full width: no copies, the flags decide.

    ``index`` is the decoder layer's number, ``name`` the module's path in the model; ``model`` is
    needed for what stands around the experts, see `around`.
    """

    def __init__(self, index: int, name: str, module: nn.Module, model: nn.Module | None = None):
        self.index, self.name, self.module, self.model = index, name, module, model
        if full := getattr(module, "flexmoe_full", None):  # released: see `elastic`
            self.E, self.I, self.H = full
            return
        down = module.down_proj
        if hasattr(module, "flexmoe_offset_E"):
            raise FlexmoeError(
                f"{name} is of a ragged export, whose experts are cut already: nothing can be "
                "measured or changed at full width here. Use the family it was exported from, with "
                "--pruned"
            )
        if not isinstance(down, Tensor) or down.dim() != 3:
            raise FlexmoeError(f"{name}.down_proj is not a 3-D tensor of experts: cannot be pruned")
        self.E = down.shape[0]
        self.I, self.H = down.shape[1:] if module.is_transposed else down.shape[:0:-1]

    @property
    def shape(self) -> LayerShape:
        """Counts of this layer, see `LayerShape`."""
        sides = 2 if self.module.has_gate else 1
        bias = int(self.module.has_bias)
        return LayerShape(
            experts=self.E,
            channels=self.I,
            hidden=self.H,
            channel_parameters=(sides + 1) * self.H + sides * bias,
            fixed_parameters=self.H * bias,
        )

    @property
    def flags(self) -> tuple[str, ...]:
        """The layout flags that are set."""
        return tuple(flag for flag in LAYOUT_FLAGS if getattr(self.module, flag, False))

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that hold channels, by name (``down_proj_bias`` holds none)."""
        up = "gate_up_proj" if self.module.has_gate else "up_proj"
        names = [up, "down_proj"] + ([f"{up}_bias"] if self.module.has_bias else [])
        return {name: getattr(self.module, name) for name in names}

    def channel_major(self, name: str, tensor: Tensor) -> list[Tensor]:
        """A parameter (or its gradient) as views [E, I, ...] with one channel a row: gate and up
        for ``gate_up_proj`` and its bias, one view for the others."""
        if tensor.dim() == 3 and self.module.is_transposed == (name != "down_proj"):
            tensor = tensor.mT
        if not name.startswith("gate_up"):
            return [tensor]
        if self.module.is_concatenated:
            return [tensor[:, : self.I], tensor[:, self.I :]]
        return [tensor[:, 0::2], tensor[:, 1::2]]

    def permute_(self, order_EI: Tensor) -> None:
        """Put the channels of every expert into ``order_EI`` in place: the same function."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                own, order = own_rows(parameter.detach(), order_EI)
                for view in self.channel_major(name, own):
                    index = order.to(view.device, torch.long)
                    if view.dim() == 3:
                        index = index[:, :, None].expand_as(view)
                    view.copy_(view.gather(1, index))


def expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Every MoE layer of ``model`` in order, or a `FlexmoeError` that says why there is none."""
    layers: dict[int, ExpertLayer] = {}
    for name, module in model.named_modules():
        if not is_experts(module):
            continue
        number = re.search(r"\.(\d+)\.", name)
        if number is None:
            raise FlexmoeError(f"experts module '{name}' does not stand in a numbered layer")
        index = int(number[1])
        if index in layers:
            raise FlexmoeError(
                f"two experts modules in layer {index} ('{layers[index].name}' and '{name}'): "
                "models with several groups of routed experts in a layer are not supported"
            )
        layers[index] = ExpertLayer(index, name, module, model)
    if not layers:
        raise FlexmoeError(_why_no_experts(model))
    return [layers[i] for i in sorted(layers)]


def routed_parameters(model: nn.Module) -> int:
    """Parameters stored in the routed experts of ``model``, in stock or in ragged storage."""
    names = ("gate_up_proj", "up_proj", "down_proj")
    return sum(
        parameter.numel()
        for module in model.modules()
        if is_experts(module)
        for name, parameter in module.named_parameters(recurse=False)
        if name.removesuffix("_bias") in names
    )


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` is a fused experts module on the transformers experts interface."""
    flags = (flag for flag in LAYOUT_FLAGS if flag != SINCE_5_20)
    return hasattr(module, "_apply_gate") and all(hasattr(module, flag) for flag in flags)


def _why_no_experts(model: nn.Module) -> str:
    config = getattr(model, "config", None)
    kind = f"{type(model).__name__} (model_type '{getattr(config, 'model_type', '?')}')"
    own = sorted({type(m).__name__ for m in model.modules() if "Expert" in type(m).__name__})
    if own:
        return (
            f"{kind} has experts of its own ({', '.join(own)}) that are not on the transformers "
            "experts interface (use_experts_implementation), the one place where flexmoe can "
            "observe and prune channels. Convert the model to an architecture that is, or ask "
            "for an adapter."
        )
    return (
        f"no routed experts found in {kind}: flexmoe prunes Mixture-of-Experts models only "
        "(a dense model, or the MoE layers are switched off in its config)"
    )


# --- The functions registered at the seam -----------------------------------------------------


def _whole(module: nn.Module, routing: Routing, y_SH: Tensor) -> Tensor:
    """What the down projections gave, as whole expert outputs: with bias and norm, where the
    architecture has them. Both are of an expert, not of a channel, and stay at every width."""
    if module.has_bias:
        y_SH = y_SH + module.down_proj_bias[routing.expert_S]
    has_norm = getattr(module, SINCE_5_20, False)
    return module.post_expert_norm(y_SH) if has_norm else y_SH


@dataclass(frozen=True)
class Seen:
    """All that goes by in one call of an experts module: its arguments, the routed pairs, and for
    each of them what enters the activation ``pre_S`` (gate and up as they are stored), channel
    activations, the expert's whole output before its routing weight; and their sum per token."""

    x_TH: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    routing: Routing
    pre_S: Tensor
    h_SI: Tensor
    y_SH: Tensor
    out_TH: Tensor


def full_width_forward(
    module: nn.Module,
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    edit: Callable[[Routing, Tensor], Tensor],
    routing: Routing | None = None,
    see: Callable[[Seen], None] | None = None,
) -> Tensor:
    """The experts at full width; ``edit(routing, h_SI)`` sees the channel activations and returns
    those to go on with, ``see`` is shown everything at the end. ``routing`` is what the indices
    say, unless given."""
    if getattr(module, "flexmoe_full", None):
        raise FlexmoeError("channels were released: call flexmoe.restore(model) first")
    if routing is None:
        routing = Routing.of(index_TK, weight_TK, module.down_proj.shape[0])
    x_SH = x_TH[routing.token_S]
    name = "gate_up_proj" if module.has_gate else "up_proj"
    # unbind, not indexing: its gradient is one stack instead of a full-size zero per expert
    up_E, down_E = getattr(module, name).unbind(0), module.down_proj.unbind(0)
    parts = zip(routing.segments, routing.split(x_SH), strict=True)
    h = [_linear(module, x_nH, up_E[e]) for (e, _, _), x_nH in parts]
    pre_S = torch.cat(h) if h else x_SH.new_zeros(0, getattr(module, name).shape[1])
    if module.has_bias:
        pre_S = pre_S + getattr(module, f"{name}_bias")[routing.expert_S]
    h_SI = edit(routing, module._apply_gate(pre_S) if module.has_gate else module.act_fn(pre_S))
    parts = zip(routing.segments, routing.split(h_SI), strict=True)
    y = [_linear(module, h_nI, down_E[e]) for (e, _, _), h_nI in parts]
    y_SH = _whole(module, routing, torch.cat(y) if y else torch.zeros_like(x_SH))
    out_TH = routing.combine(y_SH, x_TH, index_TK.shape[1])
    if see is not None:
        see(Seen(x_TH, index_TK, weight_TK, routing, pre_S, h_SI, y_SH, out_TH))
    return out_TH


def _linear(module: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    x = x.to(weight.dtype)
    return x @ weight if module.is_transposed else F.linear(x, weight)


def unchanged(routing: Routing, h_SI: Tensor) -> Tensor:
    """The observer that changes nothing."""
    return h_SI


def observe_forward(module: nn.Module, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Registered as ``flexmoe_observe``: ``module.flexmoe_observer`` sees activations go by, its
    method ``see``, where it has one, everything (see `Seen`)."""
    observer = module.flexmoe_observer
    see = getattr(observer, "see", None)
    return full_width_forward(module, x_TH, index_TK, weight_TK, observer, see=see)


def mask_forward(module: nn.Module, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Registered as ``flexmoe_mask``: channel activations times ``module.flexmoe_mask_EI``,
    through which gradients flow; ``module.flexmoe_load_E`` tells how many pairs each expert got.
    The oracle for every other way to prune."""
    mask_EI = module.flexmoe_mask_EI

    def edit(routing: Routing, h_SI: Tensor) -> Tensor:
        module.flexmoe_load_E = torch.bincount(routing.expert_S, minlength=mask_EI.shape[0])
        return h_SI * mask_EI[routing.expert_S].to(h_SI.dtype)

    return full_width_forward(module, x_TH, index_TK, weight_TK, edit)


@contextmanager
def masked(layers: Sequence[ExpertLayer]) -> Iterator[None]:
    """What `mask_forward` reads and notes on the modules goes after the block."""
    try:
        yield
    finally:
        for layer in layers:
            for name in ("flexmoe_mask_EI", "flexmoe_load_E"):
                layer.module.__dict__.pop(name, None)


def prefix_forward(module: nn.Module, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Registered as ``flexmoe``: expert e computes its first ``module.flexmoe_width_E[e]``
    channels and no more. Where ``module.flexmoe_token_budget_T`` (int) is set and not None, token t
    goes by its own row ``flexmoe_token_budget_T[t]`` of ``module.flexmoe_width_BE`` instead. The
    kernels decide which back end runs: a compiled one where nobody asks for gradients."""
    with STORAGE:  # no width may pass what is stored
        width_BE, token_budget_T = _budgets(module, x_TH)
        routed = x_TH, index_TK, weight_TK
        compute = partial(experts, *routed, stored_weights(module), width_BE, token_budget_T)
        if x_TH.is_cuda:  # what was launched is waited for before weights go, see `elastic`
            return compute()
    return compute()


def _budgets(module: nn.Module, x_TH: Tensor) -> tuple[Tensor, Tensor | None]:
    """The widths of all budgets in use, and which of them each token is at (None: the only one)."""
    token_budget_T = getattr(module, "flexmoe_token_budget_T", None)
    if token_budget_T is None:
        return table(module, "width_E", [module.flexmoe_width_E], x_TH.device), None
    if len(token_budget_T) != len(x_TH):
        raise FlexmoeError(
            f"flexmoe_token_budget_T has budgets for {len(token_budget_T)} tokens, the batch has "
            f"{len(x_TH)}: set it anew for every batch, or to None"
        )
    width_BE = module.flexmoe_width_BE
    if isinstance(width_BE, Tensor):
        return width_BE, token_budget_T
    return table(module, "width_BE", width_BE, x_TH.device), token_budget_T


ALL_EXPERTS_FUNCTIONS.register("flexmoe_observe", observe_forward)
ALL_EXPERTS_FUNCTIONS.register("flexmoe_mask", mask_forward)
ALL_EXPERTS_FUNCTIONS.register("flexmoe", prefix_forward)


@contextmanager
def experts_function(model: nn.Module, name: str) -> Iterator[None]:
    """Run the model's experts through the registered function ``name`` inside the block."""
    before = model.get_experts_implementation()
    model.set_experts_implementation(name)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
