"""The observe pass over a model larger than memory: layer by layer, activations on disk.

Instead of batch after batch through all layers, all batches go through one decoder layer after the
other, so that a layer's weights are read once. What a layer gives for each window is written to a
file and read as what the next one gets. Gradients go the same way back: the last norm and the head
give the gradient at the last layer's output, then every layer is run again from its stored input
with the graph recorded, and passes the gradient on. The sums are those of `statistics.observe`
but for the rounding of other micro-batches.

A layer is always run by the model's own forward pass, in which the layers before it give what is
stored instead of computing. So it gets what the model would give it (positions, masks, embeddings
of its own) without anything here knowing the architecture. Only the output of the layer just
before is there: the others give NaN, and a model where these count is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.activations import Activations, Output, check_output, same_form, tensors_of
from flexmoe.errors import FlexmoeError
from flexmoe.experts import experts_function
from flexmoe.layer_loader import LayerLoader
from flexmoe.memory import fitting
from flexmoe.progress import Track, silent
from flexmoe.resume import Work
from flexmoe.statistics import (
    LayerStatistics,
    Observer,
    Statistic,
    Statistics,
    find_statistics,
)
from flexmoe.training import CHUNK


def observe_streamed(
    loader: LayerLoader,
    ids: Tensor,
    names: Sequence[str],
    work: Work,
    *,
    batch_size: int = 8,
    micro_batch: int | None = None,
    chunk: int = CHUNK,
    seed: int = 0,
    track: Track = silent,
) -> Statistics:
    """`statistics.observe` with one decoder layer in memory at a time.

    ``micro_batch`` windows go through a layer at a time (by default a batch), ``chunk`` tokens
    through the head. In the folder of ``work`` are the state after every layer and, as long as
    they are needed, activations. Raises `FlexmoeError` for models whose layers use more than what
    the layer before gave them.
    """
    streamed = Pass(
        loader,
        ids,
        find_statistics(names),
        Activations(work.path / "activations", loader.device),
        batch_size=batch_size,
        micro_batch=micro_batch or batch_size,
        chunk=chunk,
    )
    saved = work.stage("observe")
    statistics: Statistics = {}
    steps, done = streamed.steps(), 0
    if (state := saved.load()) is not None:
        done, tensors = state
        streamed.micro_batch = int(tensors.pop("micro_batch"))
        statistics = _unpacked(tensors)
    with experts_function(loader.model, "flexmoe_observe"):
        for number, (step, index) in enumerate(track(steps[done:], "observe"), done + 1):
            observer = step(index)
            if observer is not None:
                statistics[index] = observer.result(seed)
            size = torch.tensor(streamed.micro_batch)
            saved.save(number, _packed(statistics) | {"micro_batch": size})
            streamed.forget(step, index)
    return dict(sorted(statistics.items()))


Step = Callable[[int], Observer | None]


@dataclass
class Pass:
    """The steps of the pass: all windows through one layer, forward or backward. Each begins with
    what the step before left in ``files`` and can be done again."""

    loader: LayerLoader
    ids: Tensor
    wanted: Sequence[Statistic]
    files: Activations
    batch_size: int
    micro_batch: int
    chunk: int

    @property
    def backward_wanted(self) -> bool:
        return any(s.when != "forward" for s in self.wanted)

    def steps(self) -> list[tuple[Step, int]]:
        """All steps in order, each with the decoder layer that it is about."""
        last, experts = len(self.loader.layers) - 1, sorted(self.loader.experts)
        if not self.backward_wanted:
            return [(self.forward, i) for i in range(experts[-1] + 1)]
        return [
            *((self.forward, i) for i in range(last + 1)),
            (self.head, last),
            *((self.backward, i) for i in range(last, experts[0] - 1, -1)),
        ]

    def rehearse(self, index: int) -> None:
        """Everything that is done with layer ``index``, from a gradient of ones: to be measured."""
        for i in range(index + 1):
            self.forward(i)
        if self.backward_wanted:
            windows = range(len(self.ids))
            given = self.files.read(_output(index), windows)
            ones = [
                torch.ones_like(part) if part is not None and part.is_floating_point() else None
                for part in tensors_of(given)
            ]
            self.files.write(_gradient(index), windows, same_form(given, ones))
            self.backward(index)

    def forget(self, step: Step, index: int) -> None:
        """Remove what nothing after this step reads."""
        if step == self.backward:
            self.files.remove(_gradient(index))
        if step == self.backward or not self.backward_wanted:
            self.files.remove(_output(index - 1))

    def forward(self, index: int) -> Observer | None:
        """What layer ``index`` gives; observed here if no gradients are wanted."""

        def do(part: range) -> None:
            given = self.files.read(_output(index - 1), part) if index else None
            self.files.write(_output(index), part, self._run(index, given, self._ids(part)))

        seen = () if self.backward_wanted else self.wanted
        with self._observed(index, seen) as observer, torch.no_grad():
            for batch in self._batches():
                self._in_parts(batch, observer, do)
        return None if self.backward_wanted else observer

    def head(self, index: int) -> None:
        """The gradient of the loss by what the last layer, ``index``, gave."""
        for batch in self._batches():
            self._in_parts(batch, None, lambda part: self._head_part(index, part))

    def _head_part(self, index: int, part: range) -> None:
        given, ids = _leaves(self.files.read(_output(index), part)), self._ids(part)
        for logits, targets in self._logits(given, ids):
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            if not torch.isfinite(loss):
                raise self._not_finite(index + 1, given, ids)
            loss.backward()
        self.files.write(_gradient(index), part, _gradients(given))

    def _logits(self, given: Output, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [n, c, V] and the tokens [n, c] that they predict, of a part of the positions at
        a time where the model can do so."""
        last, positions = len(self.loader.layers), ids.shape[1] - 1
        if "logits_to_keep" not in inspect.signature(self.loader.model.forward).parameters:
            yield self._run(last, given, ids).logits[:, :-1], ids[:, 1:]
            return
        for kept in torch.arange(positions, device=ids.device).split(max(1, self.chunk // len(ids))):
            yield self._run(last, given, ids, logits_to_keep=kept).logits, ids[:, kept + 1]

    def backward(self, index: int) -> Observer | None:
        """The gradient by what layer ``index`` got, from that by what it gave; observed here."""
        of_weights = any(s.when == "weights" for s in self.wanted)
        with self._observed(index, self.wanted) as observer:
            weights = observer.layer.parameters if observer and of_weights else {}
            for parameter in weights.values():
                parameter.requires_grad_(True)
            for batch in self._batches():
                self._in_parts(batch, observer, lambda part: self._backward_part(index, part))
                if observer is not None:
                    tokens = self.ids[batch.start : batch.stop, 1:].numel()
                    for name, parameter in weights.items():
                        if parameter.grad is not None:
                            observer.add_weights(name, parameter, tokens)
        return observer

    def _backward_part(self, index: int, part: range) -> None:
        given = _leaves(self.files.read(_output(index - 1), part)) if index else None
        with torch.enable_grad():
            output = self._run(index, given, self._ids(part))
        pairs = [
            (tensor, gradient)
            for tensor, gradient in zip(
                tensors_of(output), tensors_of(self.files.read(_gradient(index), part)), strict=True
            )
            if tensor is not None and tensor.requires_grad and gradient is not None
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        if given is not None:
            self.files.write(_gradient(index - 1), part, _gradients(given))

    def _ids(self, part: range) -> Tensor:
        return self.ids[part.start : part.stop].to(self.loader.device)

    def _batches(self) -> list[range]:
        return _split(range(len(self.ids)), self.batch_size)

    @contextmanager
    def _observed(self, index: int, wanted: Sequence[Statistic]) -> Iterator[Observer | None]:
        """The layer is in memory inside the block, with an observer on its experts if it has any."""
        with self.loader.resident(index):
            if index not in self.loader.experts:
                yield None
                return
            layer = self.loader.experts[index]
            observer = layer.module.flexmoe_observer = Observer(layer, wanted)
            try:
                yield observer
            finally:
                del layer.module.flexmoe_observer

    def _in_parts(
        self, batch: range, observer: Observer | None, work: Callable[[range], None]
    ) -> None:
        """Do ``work`` on a batch by micro-batches, smaller ones from then on when memory runs out;
        ``observer`` counts the batch once."""
        before = {}
        if observer is not None:
            before = {name: value.clone() for name, value in observer.stats.values.items()}

        def run(size: int) -> None:
            if observer is not None:  # what a try that ran out of memory has left
                for name, value in before.items():
                    observer.stats.values[name] = value.clone()
                for parameter in observer.layer.parameters.values():
                    parameter.grad = None
            for part in _split(batch, size):
                work(part)

        size = min(self.micro_batch, len(batch))
        _, fits = fitting(run, size)
        if fits < size:
            self.micro_batch = fits
        if observer is not None:
            observer.stats.tokens += self.ids[batch.start : batch.stop].numel()
            observer.stats.batches += 1

    def _run(self, index: int, given: Output | None, ids: Tensor, **settings: Any) -> Any:
        """What decoder layer ``index`` gives for windows ``ids`` [n, t] if the layer before it gave
        ``given``; for an index beyond the last layer what the model gives."""
        before = None if given is None else _nothing(given)
        try:
            output = self._forward(index, given, before, ids, **settings)
        except LookupError as error:
            if index == 0:
                raise
            raise self._depends(index, f"it looks for {error} and finds nothing") from error
        if index == len(self.loader.layers):
            return output
        output = check_output(output, f"decoder layer {index}")
        for tensor in tensors_of(output):
            if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
                raise self._not_finite(index, given, ids)
        return output

    def _forward(
        self, index: int, given: Output | None, before: Output | None, ids: Tensor, **settings: Any
    ) -> Any:
        """The model's own forward pass up to layer ``index``, or to its end. The layers before
        give ``before``, the one just before ``given``."""
        layers = self.loader.layers
        for j, layer in enumerate(layers[:index]):
            layer.forward = _giving(given if j == index - 1 else before)
        if index < len(layers):
            layers[index].forward = _ending(layers[index].forward)
        try:
            return self.loader.model(input_ids=ids, use_cache=False, **settings)
        except _End as end:
            return end.output
        finally:
            for layer in layers[: index + 1]:
                del layer.forward

    def _not_finite(self, index: int, given: Output | None, ids: Tensor) -> FlexmoeError:
        """Why what layer ``index`` (or the model) gives is not finite."""
        if given is not None:
            with torch.no_grad():
                again = self._forward(index, given, given, ids)
            again = again.logits if index == len(self.loader.layers) else tensors_of(again)[0]
            if torch.isfinite(again).all():
                return self._depends(index, "it uses what layers before that one gave")
        return FlexmoeError(
            f"what decoder layer {min(index, len(self.loader.layers) - 1)} gives on the calibration "
            "data is not finite: check that the tokenizer belongs to the model and that its "
            "weights have no NaN"
        )

    def _depends(self, index: int, reason: str) -> FlexmoeError:
        last = len(self.loader.layers)
        who = f"decoder layer {index}" if index < last else "the end of the model"
        return FlexmoeError(
            f"{type(self.loader.model).__name__} cannot be read layer by layer: {who} needs more "
            f"than the output of the layer before it ({reason}). Leave out --memory"
        )


class _End(Exception):
    """Ends a forward pass with the output that was wanted."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _ending(forward: Callable[..., Any]) -> Callable[..., Any]:
    def ending(*args: Any, **kwargs: Any) -> Any:
        raise _End(forward(*args, **kwargs))

    return ending


def _nothing(output: Output) -> Output:
    """NaN in the form of ``output``, without memory."""
    parts = []
    for part in tensors_of(output):
        if part is not None and part.is_floating_point():
            part = torch.full((), torch.nan, dtype=part.dtype, device=part.device).expand_as(part)
        parts.append(part)
    return same_form(output, parts)


def _leaves(output: Output) -> Output:
    """Where gradients arrive."""
    for part in tensors_of(output):
        if part is not None and part.is_floating_point():
            part.requires_grad_(True)
    return output


def _gradients(output: Output) -> Output:
    return same_form(output, [None if part is None else part.grad for part in tensors_of(output)])


def _output(index: int) -> str:
    return f"output-{index}"


def _gradient(index: int) -> str:
    return f"gradient-{index}"


def _split(windows: range, size: int) -> list[range]:
    return [windows[at : at + size] for at in range(0, len(windows), size)]


def _packed(statistics: Statistics) -> dict[str, Tensor]:
    """Statistics as tensors by name."""
    tensors = {}
    for i, stats in statistics.items():
        tensors |= {f"{i}.{name}": value for name, value in stats.values.items()}
        tensors[f"{i}.about"] = torch.tensor(
            [stats.tokens, stats.batches, stats.experts_per_token, stats.seed]
        )
    return tensors


def _unpacked(tensors: dict[str, Tensor]) -> Statistics:
    statistics: Statistics = {}
    for name, tensor in tensors.items():
        if name.endswith(".about"):
            i = int(name.split(".")[0])
            tokens, batches, experts_per_token, seed = tensor.tolist()
            values = {
                key.split(".")[1]: value
                for key, value in tensors.items()
                if key.startswith(f"{i}.") and key != name
            }
            statistics[i] = LayerStatistics(values, tokens, batches, experts_per_token, seed)
    return statistics
