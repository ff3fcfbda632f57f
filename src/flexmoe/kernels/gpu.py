"""Back end for GPUs, see `triton_code`: imported only where it runs, as Triton may not be there."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from flexmoe.kernels.interface import Weights

ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu2")


def can_run(weights: Weights, x_TH: Tensor) -> str | None:
    """Why this back end cannot take a call, or None."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if not x_TH.is_cuda and not interpreted:
        return f"it is for CUDA tensors, these are on {x_TH.device}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if weights.activation not in ACTIVATIONS:
        return f"it knows the activations {', '.join(ACTIVATIONS)}, not '{weights.activation}'"
    return None


def experts(*args: Any, **kwargs: Any) -> Tensor:
    """See `flexmoe.kernels.interface.experts`."""
    from flexmoe.kernels import triton_code

    return triton_code.experts(*args, **kwargs)
