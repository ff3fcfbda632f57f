"""Elastic memory: give the channels beyond a budget back to the machine, and bring them back.

Released experts are in ragged storage (see `flexmoe.kernels.interface.Weights`), at the widths of
the budget they were released at; poorer budgets go on being switched live. What is given back is
read again from the checkpoint that the model was loaded from.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers
from flexmoe.hf import SIDES_OF
from flexmoe.memory import give_back
from flexmoe.storage import STORAGE, stored_weights
from flexmoe.trace import TracedLayer, trace


@dataclass(frozen=True)
class LoadedFrom:
    """Where a model's weights were loaded from, and the order its channels were put in then, by
    layer (None: that of the files)."""

    folder: Path
    order: dict[int, Tensor] | None


def release(model: PreTrainedModel) -> int:
    """Give back the memory of all channels beyond the budget that ``model`` is at; returns the
    bytes. Richer budgets are refused until `restore`, as are saving and observing the model.

    While it works, one layer is in memory twice. Other threads may go on computing at a pruned
    budget; what began at budget 0 must have ended: there transformers' own function runs, which
    takes one weight after the other.
    """
    if getattr(model, "flexmoe_source", None) is None:
        raise FlexmoeError(
            "release needs a model that flexmoe.load opened from a family or a plan: what is "
            "released is read again from there"
        )
    before = stored_bytes(model)
    for layer in expert_layers(model):
        _release(layer, layer.module.flexmoe_width_E)
    _give_back(model)
    return before - stored_bytes(model)


def _release(layer: ExpertLayer, width_E: list[int]) -> None:
    if width_E == stored_widths(layer):
        return
    module = layer.module
    refuse = module.__dict__.get("flexmoe_refuse_saving")
    _swap(
        module,
        _kept(module, width_E),
        flexmoe_offset_E=torch.tensor([0, *width_E]).cumsum(0).tolist(),
        flexmoe_full=(layer.E, layer.I, layer.H),
        flexmoe_refuse_saving=refuse or module.register_state_dict_pre_hook(_refuse_saving),
    )


def restore(model: PreTrainedModel, width: dict[int, Tensor] | None = None) -> int:
    """Read what was released from the checkpoint again, layer by layer, all of it or these first
    channels of every expert [E], by layer; returns the bytes. The budget stays what it is, and
    other threads may go on computing; beyond what is kept, a layer is in memory at once.

    Raises `FlexmoeError` if the checkpoint is gone or no longer has these weights.
    """
    released = [layer for layer in expert_layers(model) if is_released(layer.module)]
    if not released:
        return 0
    before = stored_bytes(model)
    source: LoadedFrom = model.flexmoe_source
    checkpoint = Checkpoint(source.folder)
    traced = trace(checkpoint, meta_model(source.folder))
    for layer in released:
        order_EI = None if source.order is None else source.order[layer.index]
        whole = _read(layer, traced[layer.index], checkpoint, order_EI)
        layer.module.flexmoe_refuse_saving.remove()
        gone = dict.fromkeys(("flexmoe_offset_E", "flexmoe_full", "flexmoe_refuse_saving"))
        _swap(layer.module, whole, **gone)
        if width is not None:
            _release(layer, width[layer.index].tolist())
    _give_back(model)
    return stored_bytes(model) - before


def is_released(module: nn.Module) -> bool:
    """Whether channels of this experts module were given back."""
    return getattr(module, "flexmoe_full", None) is not None


def stored_widths(layer: ExpertLayer) -> list[int]:
    """The channels of each expert that are in memory."""
    if not is_released(layer.module):
        return [layer.I] * layer.E
    offset_E = layer.module.flexmoe_offset_E
    return [b - a for a, b in pairwise(offset_E)]


def check_stored(model: PreTrainedModel, width: dict[int, Tensor]) -> None:
    """`FlexmoeError` if these widths need channels that were given back."""
    for layer in expert_layers(model):
        stored_E = stored_widths(layer)
        more = [e for e, w in enumerate(width[layer.index].tolist()) if w > stored_E[e]]
        if more:
            raise FlexmoeError(
                f"expert {more[0]} of layer {layer.index} has {stored_E[more[0]]} channels in "
                f"memory and needs {int(width[layer.index][more[0]])} at this budget: the rest was "
                "released. Call flexmoe.restore(model) first, or ask for a poorer budget"
            )


def _kept(module: nn.Module, width_E: list[int]) -> dict[str, Tensor]:
    """The first channels of every expert as the parameters of ragged storage."""
    stored = stored_weights(module)
    name = "gate_up_proj" if module.has_gate else "up_proj"
    first_E = [0] * len(width_E) if stored.offset_E is None else stored.offset_E.tolist()

    def prefixes(tensor: Tensor) -> Tensor:
        rows = tensor.detach()
        parts = [
            (rows[e] if stored.offset_E is None else rows)[first : first + w]
            for e, (first, w) in enumerate(zip(first_E, width_E, strict=False))
        ]
        return torch.cat(parts)

    kept = {name: prefixes(stored.up), "down_proj": prefixes(stored.down)}
    if stored.up_bias is not None:
        kept[f"{name}_bias"] = prefixes(stored.up_bias)
    if not module.has_gate:  # one side has no axis of its own
        kept |= {key: kept[key].squeeze(1) for key in kept if key != "down_proj"}
    return kept


def _read(
    layer: ExpertLayer, traced: TracedLayer, checkpoint: Checkpoint, order_EI: Tensor | None
) -> dict[str, Tensor]:
    """The parameters of a layer at full width, expert by expert."""
    dtype, device = layer.module.down_proj.dtype, layer.module.down_proj.device
    whole: dict[str, Tensor] = {}
    views: dict[str, Tensor] = {}
    for name, like in traced.layer.parameters.items():
        whole[name] = torch.empty(like.shape, dtype=dtype, device=device)
        views |= zip(SIDES_OF[name], traced.layer.channel_major(name, whole[name]), strict=True)
    for e in range(layer.E):
        for side, tensor in traced.expert(checkpoint, e).items():
            if side in views:
                rows = tensor if order_EI is None else tensor[order_EI[e].long()]
                views[side][e].copy_(rows)
    first_E = layer.module.flexmoe_offset_E
    for e, w in enumerate(stored_widths(layer)):
        held = layer.module.down_proj.detach()[first_E[e] : first_E[e] + w]
        if not torch.equal(held, views["down"][e, :w]):
            raise FlexmoeError(
                f"{checkpoint.path} has other weights than the model in memory (expert {e} of "
                f"layer {layer.index}): one of them was changed since it was loaded. Load it again"
            )
    return whole


def _swap(module: nn.Module, parameters: dict[str, Tensor], **attributes: Any) -> None:
    """Put these in the place of what ``module`` has; None takes an attribute away."""
    before = dict(module.named_parameters(recurse=False))
    _finish(module.down_proj.device)  # other threads may compute on streams of their own
    with STORAGE:
        for name, tensor in parameters.items():
            learns = getattr(module, name).requires_grad
            setattr(module, name, nn.Parameter(tensor, requires_grad=learns))
        for name, value in attributes.items():
            if value is None:
                delattr(module, name)
            else:
                setattr(module, name, value)
    _finish(module.down_proj.device)  # what began with the parameters before: they go now
    before.clear()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stored_bytes(model: PreTrainedModel) -> int:
    """Bytes of storage behind the parameters of all experts."""
    found = [p for layer in expert_layers(model) for p in layer.module.parameters(recurse=False)]
    return sum({p.data_ptr(): p.untyped_storage().nbytes() for p in found}.values())


def _give_back(model: PreTrainedModel) -> None:
    give_back()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def _refuse_saving(module: nn.Module, prefix: str, keep_vars: bool) -> None:
    raise FlexmoeError(
        "channels of this model were released: call flexmoe.restore(model) before it is saved, or "
        "write the member with flexmoe.export"
    )
