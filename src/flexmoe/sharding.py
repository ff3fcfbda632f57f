"""A model larger than one device: its decoder layers split over all processes (FSDP2).

Each process loads the whole model in its CPU memory first, which one machine must hold once for
every process on it; only then the layers go to the devices, one after the other. A layer is
gathered while it computes, forward and backward, so all processes must make the same calls.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from flexmoe.errors import FlexmoeError

if TYPE_CHECKING:
    from flexmoe.experts import ExpertLayer


def check_processes() -> None:
    """`FlexmoeError` unless there are processes to split a model over."""
    if not dist.is_initialized():
        raise FlexmoeError(
            "shard has no effect with one process: leave it out, or start several with "
            "torchrun --nproc-per-node N -m flexmoe ..."
        )


def shard_model(model: nn.Module, layers: Sequence[ExpertLayer], device: torch.device) -> None:
    """Split ``model``, which stands whole on the CPU of every process, over their devices: each
    decoder layer by itself, then what is left. Its parameters are DTensors afterwards."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    stacks = {re.split(r"\.\d+\.", layer.name)[0] for layer in layers}
    # transformers remembers the answer by class, and would not find it for the class FSDP2 makes
    model._can_set_experts_implementation()
    for stack in sorted(stacks):
        for layer in model.get_submodule(stack).children():
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard_model` was here."""
    return isinstance(model, FSDPModule)


@contextmanager
def gathered(model: nn.Module, layer: ExpertLayer) -> Iterator[None]:
    """The weights around ``layer`` stand whole in every process inside the block."""
    around = [
        module
        for name, module in model.named_modules()
        if isinstance(module, FSDPModule) and name and layer.name.startswith(f"{name}.")
    ]
    for module in around:
        module.unshard()
    try:
        yield
    finally:
        for module in around:
            module.reshard()


def own_rows(tensor: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """This process's part of a tensor that may be sharded (by its first dimension, as FSDP2 does),
    and the same rows of another one."""
    if not isinstance(tensor, DTensor):
        return tensor, rows
    size = -(-tensor.shape[0] // dist.get_world_size())
    start = dist.get_rank() * size
    return tensor.to_local(), rows[start : start + size]


def in_step(parts: Sequence[Tensor], spare: Tensor) -> list[Tensor]:
    """``parts`` [n, t] and as many of a single token, ``spare`` [1, 1], which predicts nothing, as
    it takes for all processes to have the same number."""
    numbers = [0] * dist.get_world_size()
    dist.all_gather_object(numbers, len(parts))
    return [*parts, *[spare] * (max(numbers) - len(parts))]
