"""Activations that compiled back ends know by name, as torch computes them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor

# in the order in which the C++ source enumerates them
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def gated(name: str) -> Callable[[Tensor], Tensor]:
    """What maps gate and up side by side [n, 2w] to activations [n, w]."""
    activation = ACTIVATIONS[name]

    def activate(pre: Tensor) -> Tensor:
        gate, up = pre.chunk(2, -1)
        return activation(gate) * up

    return activate
