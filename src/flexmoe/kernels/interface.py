"""The signature all back ends share, and the storage they read."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.kernels import cpu, torch_loop, triton_gpu

# Back ends, the first that can run is taken. Each is a module with `experts`, of the signature
# below, and `can_run(weights, x_TH)`: None, or the reason why it cannot.
BACKENDS: dict[str, Any] = {"cpu": cpu, "triton": triton_gpu, "torch": torch_loop}

PLAIN = {Tensor, torch.nn.Parameter}  # what they read

# One of them for all calls, or None. Read once: it took 40 microseconds of every call in which
# caches were full of weights.
FORCED = os.environ.get("FLEXMOE_KERNEL") or None


class Kept(dict[Any, Any]):
    """What `experts` and back ends found out about weights, for the calls that follow. Copies are
    of other weights, and empty."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Kept:
        return Kept()

    def __reduce__(self) -> tuple[type[Kept], tuple[()]]:
        return Kept, ()


@dataclass(frozen=True)
class Weights:
    """The experts of one layer, the channels of each best first, in one of two storages.

    Ragged (``offset_E`` is given): the channels of all experts one after the other, ``R`` in all.
    ``up`` [R, C, H]: gate and up of each channel (C = 2), or up alone (C = 1, no gate);
    ``down`` [R, H]; ``offset_E`` int32 [E + 1], the first channel of each expert and R at the end:
    those between two offsets are what is in memory, and no width may pass them.
    Full (``offset_E`` is None): ``up`` [E, I, C, H], ``down`` [E, I, H]. Both may be views with any
    strides; back ends say which they read as they lie.

    ``up_bias`` ([R, C] or [E, I, C]) and ``down_bias_EH`` where the architecture has them; the down
    bias is of an expert, not of a channel, and is added at every width, 0 too.
    ``up_scale`` ([R, C] or [E, I, C]) and ``down_scale`` ([R] or [E, I]), float32: what each row of
    weights is multiplied by, a row of down being a channel. For float8_e4m3fn weights, else None.
    ``activate`` maps gate and up side by side [n, 2w] (or up alone [n, w]) to activations [n, w];
    ``activation`` is its name for compiled back ends, "" if only `activate` can say what it does.
    ``norm`` maps whole outputs of experts [n, H], bias included, to what the routing weight
    multiplies; None where nothing does.
    ``kept``: found out in earlier calls, see `knowing`.
    """

    up: Tensor
    down: Tensor
    offset_E: Tensor | None
    activate: Callable[[Tensor], Tensor]
    activation: str = ""
    up_bias: Tensor | None = None
    down_bias_EH: Tensor | None = None
    norm: Callable[[Tensor], Tensor] | None = None
    up_scale: Tensor | None = None
    down_scale: Tensor | None = None
    kept: Kept = field(default_factory=Kept, init=False, compare=False, repr=False)

    def knowing(self, kept: Kept) -> Weights:
        """These weights, made anew for a call, with what earlier calls found out about the same
        experts. Other tensors may have taken the place of theirs; all else must be as it was."""
        object.__setattr__(self, "kept", kept)
        return self

    @property
    def known(self) -> Kept:
        """What is kept of weights that lie as these do. All that can change with their place is
        looked at only when they have moved: each look takes microseconds of a call in which caches
        were full of weights."""
        up, down, bias = self.up, self.down, self.up_bias
        at = up.data_ptr(), down.data_ptr()
        found: tuple[Any, Kept] | None = self.__dict__.get("found")
        if found is None or found[0] != at:
            strides = (up.stride(), down.stride(), None if bias is None else bias.stride())
            layout = (up.dtype, down.dtype, up.device, up.shape, *strides)
            found = at, self.kept.setdefault(layout, Kept())
            object.__setattr__(self, "found", found)
        return found[1]

    @property
    def tensors(self) -> list[Tensor]:
        """The parameters, without the table of offsets."""
        found = (self.up, self.down, self.up_bias, self.down_bias_EH)
        scales = (self.up_scale, self.down_scale)
        return [tensor for tensor in found + scales if tensor is not None]


def experts(
    x_TH: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    weights: Weights,
    width_BE: Tensor,
    token_budget_T: Tensor | None = None,
    budget: int = 0,
    backend: str | None = None,
) -> Tensor:
    """What the routed experts add to every token [T, H].

    Token t goes through its experts ``index_TK[t]``, each cut to the first
    ``width_BE[token_budget_T[t], e]`` of its channels, and their outputs are added up with
    ``weight_TK[t]``. Without ``token_budget_T`` (int32) all tokens are at ``budget``. Indices
    outside 0..E-1 are experts held elsewhere and contribute nothing.

    ``backend`` (or the environment variable FLEXMOE_KERNEL, set before this is imported) forces a
    back end by its name, which is an error if it cannot run; else the first that can is taken.
    """
    (T, H), routed, offset_E = x_TH.shape, index_TK.shape, weights.offset_E
    E = weights.up.shape[0] if offset_E is None else offset_E.shape[0] - 1
    known = token_budget_T is None or token_budget_T.shape[0] >= T
    together = routed == weight_TK.shape and routed[0] == T and width_BE.shape[1] == E
    if not (known and together and weights.up.shape[-1] == H):
        raise FlexmoeError(  # kernels would read what is not there
            f"tokens {[*x_TH.shape]}, experts {[*index_TK.shape]} and weights {[*weight_TK.shape]} "
            f"of them, widths {[*width_BE.shape]} and gate and up {[*weights.up.shape]} of {E} "
            "experts do not go together, or tokens have no budget"
        )
    run = _backend(weights, x_TH, weight_TK, backend or FORCED)
    return run.experts(x_TH, index_TK, weight_TK, weights, width_BE, token_budget_T, budget)


def check_forced() -> None:
    """`FlexmoeError` where FLEXMOE_KERNEL names no back end."""
    if FORCED is not None and FORCED not in BACKENDS:
        raise did_you_mean(FORCED, BACKENDS, "FLEXMOE_KERNEL")


def _backend(weights: Weights, x_TH: Tensor, weight_TK: Tensor, forced: str | None) -> Any:
    if forced is None:
        kinds = {type(x_TH), type(weight_TK), type(weights.up), type(weights.down)}
        plain = kinds <= PLAIN and not torch.is_grad_enabled()
        key = (x_TH.dtype, x_TH.device) if plain else None
        if key is None or (name := weights.known.get(key)) is None:
            name = next(
                name
                for name, back in BACKENDS.items()
                if _why_not(back, weights, x_TH, weight_TK) is None
            )
            if key is not None:
                weights.known[key] = name
        return BACKENDS[name]
    if forced not in BACKENDS:
        raise did_you_mean(forced, BACKENDS, "kernel")
    if reason := _why_not(BACKENDS[forced], weights, x_TH, weight_TK):
        raise FlexmoeError(
            f"the kernel '{forced}' was asked for and cannot run: {reason}. Ask for another, or "
            "for none (no `backend`, FLEXMOE_KERNEL unset): the best that can run is taken"
        )
    return BACKENDS[forced]


def _why_not(back: Any, weights: Weights, x_TH: Tensor, weight_TK: Tensor) -> str | None:
    if back is torch_loop:
        return None
    tensors = (x_TH, weight_TK, *weights.tensors)
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        return "gradients are asked for, and only 'torch' has them (use torch.no_grad())"
    if other := {type(t) for t in tensors} - PLAIN:
        return f"tensors are {', '.join(sorted(kind.__name__ for kind in other))}"
    if weights.norm is not None:
        return "outputs of experts are normalised, which only 'torch' does"
    return back.can_run(weights, x_TH)
