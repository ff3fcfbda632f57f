"""How the parameters of an experts module lie in memory, as kernels take them: stock or ragged."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from flexmoe.kernels import Kept, Weights
from flexmoe.kernels.activations import name_of

# Held while a module's parameters are replaced by those of another storage (see `elastic`), and
# while they are taken for a computation.
STORAGE = threading.Lock()


def stored_weights(module: nn.Module) -> Weights:
    """The experts of a module as kernels take them: views on the parameters, in stock or in ragged
    storage (see `flexmoe.hf`). Each parameter is taken once: an adapter computes it anew."""
    name, gate = ("gate_up_proj", 2) if module.has_gate else ("up_proj", 1)
    up, down = getattr(module, name), module.down_proj
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    offset_E = getattr(module, "flexmoe_offset_E", None)
    if offset_E is not None:
        offset_E = table(module, "offset_E", offset_E, up.device)
        if gate == 1:
            up, bias = up.unsqueeze(1), None if bias is None else bias.unsqueeze(1)
    else:
        up, down = (up.mT, down) if module.is_transposed else (up, down.mT)
        up, bias = (
            None if t is None else _sides(t, gate, module.is_concatenated) for t in (up, bias)
        )
    activate = activation_function(module)
    known = module.__dict__
    if "flexmoe_activation" not in known:
        known["flexmoe_activation"] = name_of(activate, module.has_gate, up.device)
        known["flexmoe_kept"] = Kept()
    return Weights(
        up=up,
        down=down,
        offset_E=offset_E,
        activate=activate,
        activation=known["flexmoe_activation"],
        up_bias=bias,
        down_bias_EH=module.down_proj_bias if module.has_bias else None,
        norm=module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
    ).knowing(known["flexmoe_kept"])


def _sides(tensor: Tensor, sides: int, concatenated: bool) -> Tensor:
    """[E, sides * I, ...] as [E, I, sides, ...]."""
    E, _, *rest = tensor.shape
    if concatenated:
        return tensor.view(E, sides, -1, *rest).transpose(1, 2)
    return tensor.view(E, -1, sides, *rest)


def table(module: nn.Module, name: str, rows: list[Any], device: torch.device) -> Tensor:
    """Numbers or ``rows`` of them as int32 on ``device``, the same tensor until they change: to a
    GPU each making is a copy for which everything waits."""
    made: dict[str, tuple[list[Any], Tensor]]
    made = module.__dict__.setdefault("flexmoe_tables", {})
    if name not in made or made[name][0] != rows or made[name][1].device != device:
        table = torch.tensor(rows, dtype=torch.int32, device=device)
        made[name] = deepcopy(rows), table
    return made[name][1]


def activation_function(module: nn.Module) -> Callable[[Tensor], Tensor]:
    """What maps gate and up side by side [n, 2w] (or up alone) to channel activations [n, w]. The
    module lends its function only: it may be on the meta device."""
    if not module.has_gate:
        return module.act_fn
    if module.is_concatenated:
        return module._apply_gate
    return lambda pre_n: module._apply_gate(torch.stack(pre_n.chunk(2, -1), -1).flatten(-2))
