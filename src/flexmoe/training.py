"""What learning and recovery share: batches, the distance to the teacher, several processes.

A step looks at ``batch_size`` windows. Each process takes its part of them and goes through it in
micro-batches; sums are added up over processes, so the result depends on neither but for rounding.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from flexmoe.errors import FlexmoeError

Item = TypeVar("Item")

CHUNK = 1024  # tokens whose vocabulary stands in float32 at a time
WAIT = timedelta(hours=4)  # for a process that is still busy


def batches(ids: Tensor, size: int, steps: int, seed: int) -> Iterator[Tensor]:
    """``steps`` batches of windows, reshuffled whenever all have been used."""
    generator = torch.Generator().manual_seed(seed)
    queue = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(queue) < size:
            queue = torch.cat([queue, torch.randperm(len(ids), generator=generator)])
        yield ids[queue[:size]]
        queue = queue[size:]


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) summed over the tokens that are predicted, nats, from logits
    [n, t, V]. In float32, but only `CHUNK` tokens of it live at a time, also for the gradient."""
    total = torch.zeros((), device=student.device)
    rows = student[:, :-1].flatten(0, 1).split(CHUNK)
    for ours, theirs in zip(rows, teacher[:, :-1].flatten(0, 1).split(CHUNK), strict=True):
        total = total + checkpoint(_divergence, ours, theirs, use_reentrant=False)
    return total


def _divergence(student: Tensor, teacher: Tensor) -> Tensor:
    log_student = F.log_softmax(student.float(), dim=-1)
    log_teacher = F.log_softmax(teacher.float(), dim=-1)
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)


def check_step(value: Tensor) -> None:
    """`FlexmoeError` unless what a step goes by is finite: nothing that comes of it would be, and
    an order made of it would not show that."""
    if not torch.isfinite(value).all():
        raise FlexmoeError(
            "a loss or gradient is not finite: run in float32 (--device cpu), or where weights "
            "are trained with a smaller --lr"
        )


@contextmanager
def activations_recomputed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Inside the block decoder layers keep only their inputs for the backward pass, if wanted.

    Only the flag of the layers themselves says "training": dropout and router noise stay off.
    """
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    if wanted and not layers:
        raise FlexmoeError(
            f"{type(model).__name__} has no layers that transformers can recompute: leave out "
            "gradient checkpointing and use a smaller micro-batch"
        )
    if wanted:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for layer in layers:
            layer.training = True
    try:
        yield
    finally:
        if wanted:
            model.gradient_checkpointing_disable()
            for layer in layers:
                layer.training = False


# --- Several processes ------------------------------------------------------------------------


def processes() -> tuple[int, int]:
    """This process's number and how many there are (0 and 1 without a process group)."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group(device: str) -> Iterator[str]:
    """Join the processes that ``torchrun`` or ``accelerate launch`` started, if any; yields the
    device of this one: of GPUs that of its number. `FlexmoeError` where it has none."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield device
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    if on_cuda:
        count, here = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))
        if here > count:
            raise FlexmoeError(
                f"each process needs a GPU of its own: {here} were started on this machine, which "
                f"has {count}. Start fewer with --nproc-per-node, or use --device cpu"
            )
        device = f"cuda:{local}"
        torch.cuda.set_device(torch.device(device))
    elif device not in ("auto", "cpu"):
        raise FlexmoeError(
            f"--device {device} with {world} processes: expected auto, cpu, or cuda, where each "
            "takes the GPU of its number"
        )
    # gloo also beside nccl: some sums are kept on the CPU. The wait is for the process that writes.
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=WAIT)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def part_of(batch: Tensor) -> Tensor:
    """This process's windows of a batch."""
    rank, world = processes()
    if len(batch) % world:
        raise FlexmoeError(
            f"a batch of {len(batch)} windows cannot be shared by {world} processes: use a "
            "--batch-size that is a multiple of their number"
        )
    return batch.chunk(world)[rank]


def share(batches: Sequence[Item]) -> Sequence[Item]:
    """This process's batches of a pass: every n-th."""
    rank, world = processes()
    if len(batches) < world:
        raise FlexmoeError(
            f"{len(batches)} batches of calibration text cannot be shared by {world} processes: "
            "use more --samples, a smaller --batch-size or fewer processes"
        )
    return batches[rank::world]


def by_first(work: Callable[[], object]) -> None:
    """Let the first process do ``work`` when all have come here; the others wait for it, and fail
    if it fails."""
    rank, world = processes()
    if world == 1:
        work()
        return
    dist.barrier()
    error: Exception | None = None
    if rank == 0:
        try:
            work()
        except Exception as caught:
            error = caught
    said = [None if error is None else str(error)]
    dist.broadcast_object_list(said, src=0)
    if error is not None:
        raise error
    if said[0] is not None:
        raise FlexmoeError(said[0])


def add_up(tensors: Sequence[Tensor]) -> None:
    """Sum each tensor over all processes, in place."""
    if processes()[1] > 1 and tensors:
        flat = torch.cat([t.flatten() for t in tensors])
        dist.all_reduce(flat)
        for tensor, total in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))
