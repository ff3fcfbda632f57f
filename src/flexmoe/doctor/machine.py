"""What this machine can do: rates measured for a moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from flexmoe.doctor.pace import repeated
from flexmoe.experts import expert_layers

MOMENT = 0.05  # seconds each rate is measured for


@dataclass(frozen=True)
class Rates:
    """Operations and bytes a second of a device."""

    operations: float
    bytes: float


def measure_rates(device: torch.device, dtype: torch.dtype, rows: int, model: nn.Module) -> Rates:
    """Of a product [rows, H] x [H, I] in the shape of the model's experts, and of a copy of 32 MB;
    each is repeated for a moment."""
    layer = expert_layers(model)[0]
    a = torch.ones(max(rows, 1), layer.H, dtype=dtype, device=device)
    b = torch.ones(layer.H, layer.I, dtype=dtype, device=device)
    source = torch.ones(2**23, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    product = _repeated(lambda: a @ b, device)
    copy = _repeated(lambda: target.copy_(source), device)
    return Rates(2 * a.numel() * layer.I / product, source.nbytes / copy)


def _repeated(work: Callable[[], object], device: torch.device) -> float:
    """Seconds a call, the median of those of a moment: one call in which a thread has to wait for a
    core would count for a hundred."""

    def whole() -> None:
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return median(repeated(whole, MOMENT))
