"""A step of a job without weights, data or arithmetic: how much memory and how many operations.

The model runs on fake tensors, which have shapes and nothing else, so the count holds for every
architecture and needs no formulas of attention, norms or state space layers. Decoder layers that
are alike are run twice and then counted: the second one stands for those that follow.

Experts get equal shares of the tokens. What real routing changes is how the tokens are dealt out,
not how many there are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flexmoe.around import Pairs
from flexmoe.doctor.meter import Cost, Meter
from flexmoe.experts import (
    ExpertLayer,
    Routing,
    Seen,
    expert_layers,
    experts_function,
    full_width_forward,
    unchanged,
)
from flexmoe.statistics import Statistic, goes_backward, token_loss
from flexmoe.training import activations_recomputed, divergence

ALIKE = 2  # layers of a kind that are really run


@dataclass
class _Kind:
    """Decoder layers that are alike: how many, and what one forward pass of one of them keeps for
    the backward pass, computes and writes."""

    number: int = 0
    kept: int = 0
    calls: int = 0
    operations: float = 0.0
    moved: float = 0.0
    output: Any = None

    @property
    def left_out(self) -> int:
        return max(0, self.number - ALIKE)


@dataclass
class DryRun:
    """A model (from `meta_model`, which it takes over) as fake tensors of ``dtype``, and the steps
    that it can try. ``heap``: in the memory of the C library, see `HEAP`."""

    model: PreTrainedModel
    dtype: torch.dtype
    heap: bool = True
    kinds: dict[Any, _Kind] = field(default_factory=dict)
    taught: dict[tuple[int, int], tuple[Cost, torch.Size]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.layers = expert_layers(self.model)
        self.mode = FakeTensorMode()
        self.watching = False
        with self.mode:
            _materialize(self.model, self.dtype)
        first = self.layers[0].name
        number = re.search(r"\.\d+\.", first)
        assert number is not None  # `expert_layers` refuses those without
        for layer in self.model.get_submodule(first[: number.start()]).children():
            self._wrap(layer)

    def _wrap(self, layer: nn.Module) -> None:
        kind = self.kinds.setdefault(_signature(layer), _Kind())
        kind.number += 1
        forward: Callable[..., Any] = layer.forward
        run = kind.number <= ALIKE

        def watched(*args: Any, **kwargs: Any) -> Any:
            if not run:
                hidden = args[0] if args else kwargs["hidden_states"]
                return (hidden, *kind.output[1:]) if isinstance(kind.output, tuple) else hidden
            meter = self.meter
            before = meter.live, meter.operations, meter.moved
            kind.output = out = forward(*args, **kwargs)
            if self.watching:
                kind.kept = max(kind.kept, meter.live - before[0])
                kind.calls += 1
                kind.operations += meter.operations - before[1]
                kind.moved += meter.moved - before[2]
            return out

        layer.forward = watched

    @contextmanager
    def _counted(
        self,
        function: Callable[[Routing, Tensor], Tensor],
        see: Callable[[ExpertLayer, Seen], None] | None = None,
    ) -> Iterator[list[Cost]]:
        """Everything inside the block is counted; the list has the cost when it ends."""
        for layer in self.layers:
            layer.module.flexmoe_dry = function
            layer.module.flexmoe_dry_see = see and partial(see, layer)
        for kind in self.kinds.values():
            kind.kept, kind.calls, kind.operations, kind.moved = 0, 0, 0.0, 0.0
        known = [*self.model.parameters(), *self.model.buffers()]
        known += [p.grad for p in self.model.parameters() if p.grad is not None]
        self.meter, self.total, self.watching = Meter(known, self.heap), _Kind(), False
        found: list[Cost] = []
        with self.mode, self.meter, experts_function(self.model, "flexmoe_dry"):
            yield found
        for parameter in self.model.parameters():
            parameter.grad = None
        meter, kinds = self.meter, list(self.kinds.values())
        extra = [(k, k.left_out * k.calls / min(k.number, ALIKE)) for k in kinds if k.calls]
        # operations of layers left out, as a share of those of the forward passes that were run
        more = [
            sum(getattr(k, name) / k.calls * calls for k, calls in extra)
            / max(getattr(self.total, name), 1.0)
            for name in ("operations", "moved")
        ]
        found.append(
            Cost(
                meter.peak + sum(k.left_out * k.kept for k in kinds),
                meter.operations * (1 + more[0]),
                meter.moved * (1 + more[1]),
            )
        )

    def _logits(self, windows: int, length: int) -> Tensor:
        ids = torch.zeros(windows, length, dtype=torch.long)
        self.watching, before = True, (self.meter.operations, self.meter.moved)
        logits = self.model(input_ids=ids, use_cache=False).logits
        self.watching = False
        self.total.operations += self.meter.operations - before[0]
        self.total.moved += self.meter.moved - before[1]
        return logits

    # --- the steps ----------------------------------------------------------------------------

    def observe(self, windows: int, length: int, wanted: Sequence[Statistic]) -> Cost:
        """One batch of `flexmoe.observe.observe`."""
        backward = goes_backward(wanted)
        of_weights = [s for s in wanted if s.when == "weights"]

        def edit(routing: Routing, h_SI: Tensor) -> Tensor:
            if backward and not h_SI.requires_grad:
                h_SI = h_SI.requires_grad_()
            if backward:
                kept = h_SI.detach()
                h_SI.register_hook(lambda grad: _apply(wanted, routing, kept, grad))
            return h_SI

        self.model.requires_grad_(False)
        handles = []
        for layer in self.layers if of_weights else ():
            for parameter in layer.parameters.values():
                parameter.requires_grad_(True)
                handles.append(parameter.register_post_accumulate_grad_hook(_drop_gradient))
        with torch.set_grad_enabled(backward), self._counted(edit, partial(_see, wanted)) as found:
            ids = torch.zeros(windows, length, dtype=torch.long)
            loss = token_loss(self._logits(windows, length), ids)
            if backward:
                loss.backward()
        for handle in handles:
            handle.remove()
        return found[0]

    def learn(self, windows: int, length: int, draws: int, checkpointing: bool) -> Cost:
        """One half of a step of `flexmoe.learn.learn_positions`, in one piece."""
        masks: list[Tensor] = []
        self.model.requires_grad_(False)
        teacher, shape = self._teacher(windows, length)
        with (
            activations_recomputed(self.model, checkpointing),
            self._counted(lambda routing, h_SI: h_SI * masks[-1][routing.expert_S]) as found,
        ):
            masks.append(self._mask().requires_grad_(True))
            taught = torch.empty(shape, dtype=self.dtype)
            divergence(self._logits(windows, length), taught).backward()
        return teacher.then(found[0].times(draws))

    def scale(self, windows: int, length: int) -> Cost:
        """One part of a step of the method `diep`: a pass that keeps what all experts give, and
        one with the experts scaled, its loss and gradients."""
        self.model.requires_grad_(False)
        teacher, _ = self._teacher(windows, length)
        masks: list[Tensor] = []
        with self._counted(lambda routing, h_SI: h_SI * masks[-1][routing.expert_S]) as found:
            masks.append(self._mask().requires_grad_(True))
            # of every layer before and after, and the difference
            outputs = [
                torch.empty(3, windows * length, layer.H, dtype=self.dtype) for layer in self.layers
            ]
            ids = torch.zeros(windows, length, dtype=torch.long)
            token_loss(self._logits(windows, length), ids).backward()
            del outputs
        return teacher.then(found[0])

    def _teacher(self, windows: int, length: int) -> tuple[Cost, torch.Size]:
        """The cost of a teacher's logits, and their shape; tried once, most steps begin with it."""
        if (windows, length) not in self.taught:
            with torch.no_grad(), self._counted(unchanged) as found:
                shape = self._logits(windows, length).shape
            self.taught[windows, length] = found[0], shape
        return self.taught[windows, length]

    def compare(self, windows: int, length: int) -> Cost:
        """The divergence of one member from the full model, without gradients."""
        teacher, shape = self._teacher(windows, length)
        with torch.no_grad(), self._counted(unchanged) as found:
            taught = torch.empty(shape, dtype=self.dtype)
            divergence(self._logits(windows, length), taught)
        return teacher.then(found[0])

    def _mask(self) -> Tensor:
        widest = max(self.layers, key=lambda layer: layer.E * layer.I)
        return torch.zeros(widest.E, widest.I)

    @property
    def top_k(self) -> int | None:
        """Experts a token is sent to; None before a step was tried."""
        found = [getattr(layer.module, "flexmoe_top_k", None) for layer in self.layers]
        return next(filter(None, found), None)

    def forward(self, windows: int, length: int) -> Cost:
        """One forward pass without gradients."""
        return self._teacher(windows, length)[0]

    def distil(
        self,
        windows: int,
        rows: Sequence[int],
        length: int,
        trained: Sequence[nn.Parameter],
        checkpointing: bool,
    ) -> Cost:
        """One micro-batch of `flexmoe.distil.distil`: the teacher on all ``windows``, a member on
        each number of ``rows``, of which the largest is tried and counted for all."""
        self.model.requires_grad_(False)
        teacher, shape = self._teacher(windows, length)
        for parameter in trained:
            parameter.requires_grad_(True)
            with self.mode:
                parameter.grad = torch.zeros_like(parameter)
        with (
            activations_recomputed(self.model, checkpointing),
            self._counted(unchanged) as found,
        ):
            taught, count = torch.empty(shape, dtype=self.dtype), max(rows)
            logits, ids = self._logits(count, length), torch.zeros(count, length, dtype=torch.long)
            (divergence(logits, taught[:count]) + token_loss(logits, ids)).backward()
        return teacher.then(found[0].times(sum(rows) / count))


def _materialize(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters and buffers on the CPU instead of on the meta device (inside a fake mode: no
    bytes); floating ones in ``dtype``, none with a gradient. Tied ones stay tied."""
    new: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for store, own in ((module._parameters, True), (module._buffers, False)):
            for name, old in store.items():
                if old is None:
                    continue
                if id(old) not in new:
                    wanted = dtype if own and old.is_floating_point() else old.dtype
                    empty = torch.empty(old.shape, dtype=wanted)
                    made = nn.Parameter(empty, requires_grad=False) if own else empty
                    new[id(old)] = (old, made)  # the old one too, so that its id stays its own
                store[name] = new[id(old)][1]


def _signature(layer: nn.Module) -> Any:
    shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
    return tuple(type(module).__name__ for module in layer.modules()), shapes


def _apply(wanted: Sequence[Statistic], routing: Routing, h_SI: Tensor, grad_SI: Tensor) -> None:
    for s in wanted:
        if s.when == "backward":
            s.function(Pairs(routing.weight_S.detach(), h_SI, grad_SI))


def _see(wanted: Sequence[Statistic], layer: ExpertLayer, seen: Seen) -> None:
    """The larger of the forward statistics: those that look at nothing but the experts."""
    for s in wanted:
        if s.when == "forward" and not s.reads and not s.after:
            s.function(Pairs(seen.routing.weight_S.detach(), seen.h_SI.detach(), None, layer, seen))


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


def _dry_forward(module: nn.Module, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Registered as ``flexmoe_dry``: all pairs go to one expert, as no values say to which. Its
    products are of the same size together as those of all experts."""
    module.flexmoe_top_k = index_TK.shape[1]
    place_S = torch.zeros(index_TK.numel(), dtype=torch.long)
    weight_S = weight_TK.reshape(-1)[place_S]
    routing = Routing(place_S, place_S, place_S, weight_S, [(0, 0, len(place_S))])
    return full_width_forward(
        module, x_TH, index_TK, weight_TK, module.flexmoe_dry, routing, module.flexmoe_dry_see
    )


ALL_EXPERTS_FUNCTIONS.register("flexmoe_dry", _dry_forward)
