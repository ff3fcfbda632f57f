"""The observe pass over a model larger than memory: layer by layer, activations on disk.

Instead of batch after batch through all layers, all batches go through one decoder layer after the
other, so that a layer's weights are read once. What a layer gives for each window is written to a
file and read as what the next one gets. Gradients go the same way back: the last norm and the head
give the gradient at the last layer's output, then every layer is run again from its stored input
with the graph recorded, and passes the gradient on. The sums are those of `observe`
but for the rounding of other micro-batches; statistics of whole batches get these.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.around import around_experts
from flexmoe.data import Windows
from flexmoe.evidence import Evidence
from flexmoe.experts import experts_function, unchanged
from flexmoe.memory import MicroBatch
from flexmoe.observe import Observer
from flexmoe.progress import Steps, Track, silent
from flexmoe.resume import Saved
from flexmoe.statistics import LayerStatistics, Statistic, empty_statistics, goes_backward, passes
from flexmoe.streamed.activations import Activations, Output, same_form, tensors_of
from flexmoe.streamed.layer_loader import LayerLoader
from flexmoe.streamed.one_layer import not_finite, run_layer
from flexmoe.training import CHUNK


def gather_streamed(
    loader: LayerLoader,
    windows: Windows,
    names: Sequence[str],
    *,
    saved: Saved,
    batch_size: int = 8,
    micro_batch: int | None = None,
    chunk: int = CHUNK,
    seed: int = 0,
    track: Track = silent,
) -> Evidence:
    """`evidence.gather` with one decoder layer in memory at a time.

    ``micro_batch`` windows go through a layer at a time (by default a batch), ``chunk`` tokens
    through the head. ``saved`` keeps the state after every layer; activations are beside it as
    long as they are needed. Raises `FlexmoeError` for models whose layers use more than what the
    layer before gave them.
    """
    files = Activations(saved.work.path / "activations", loader.device)
    micro = MicroBatch(micro_batch or batch_size)
    found, done, kept = Evidence({}, windows.sha256), 0, None
    if (state := saved.load()) is not None:
        done, tensors = state
        micro.size = int(tensors.pop("micro_batch"))
        sources = list(dict.fromkeys(name for name, _ in windows.batches(batch_size)))
        kept = Evidence.from_tensors(sources, tensors, windows.sha256)
    before = 0  # steps of the passes before this one
    for wanted in passes(names):
        streamed = Pass(
            loader, windows, wanted, files, batch_size, micro, chunk, earlier=found.mixed()
        )
        part, steps = streamed.empty(seed), streamed.steps()
        skipped = min(max(0, done - before), len(steps))
        if kept is not None and skipped:
            part = kept.having(s.name for s in wanted)
        with experts_function(loader.model, "flexmoe_observe"):
            tokens = windows.ids.numel() / len(steps)
            for at in track(Steps(skipped, len(steps), tokens), "observe"):
                step, index = steps[at]
                step(index, part)
                skipped += 1
                size = {"micro_batch": torch.tensor(micro.size)}
                saved.save(before + skipped, found.beside(part).tensors() | size)
                streamed.forget(step, index)
        found, before = found.beside(part), before + len(steps)
    return found


@dataclass(frozen=True)
class Batch:
    """Windows ``ids`` [n, t] of one source, and their ``places`` among all that are observed."""

    source: str
    places: range
    ids: Tensor


Step = Callable[[int, Evidence], None]


@dataclass
class Pass:
    """The steps of the pass: all windows through one layer, forward or backward. Each begins with
    what the step before left in ``files`` and can be done again; the experts' statistics are those
    of ``found``."""

    loader: LayerLoader
    windows: Windows
    wanted: Sequence[Statistic]
    files: Activations
    batch_size: int
    micro: MicroBatch
    chunk: int
    earlier: Mapping[int, LayerStatistics] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.batches: list[Batch] = []
        for source, ids in self.windows.batches(self.batch_size):
            start = self.batches[-1].places.stop if self.batches else 0
            self.batches.append(Batch(source, range(start, start + len(ids)), ids))
        self.ids = torch.cat([batch.ids for batch in self.batches])
        self.sources = list(dict.fromkeys(batch.source for batch in self.batches))
        self.backward_wanted = goes_backward(self.wanted)

    def empty(self, seed: int = 0) -> Evidence:
        """Statistics with the tokens and batches of each source, all sums 0."""
        layers, found = list(self.loader.experts.values()), {}
        for source in self.sources:
            found[source] = empty_statistics(layers, self.wanted, seed)
            mine = [batch.ids for batch in self.batches if batch.source == source]
            for stats in found[source].values():
                stats.tokens, stats.batches = sum(ids.numel() for ids in mine), len(mine)
        return Evidence(found, self.windows.sha256)

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

    def forget(self, step: Step, index: int) -> None:
        """Remove what nothing after this step reads."""
        if step == self.backward:
            self.files.remove(_gradient(index))
        if step == self.backward or not self.backward_wanted:
            self.files.remove(_output(index - 1))

    def rehearse(self, index: int) -> None:
        """Everything that is done with layer ``index``, from a gradient of ones: to be measured."""
        found, places = self.empty(), range(len(self.ids))
        with experts_function(self.loader.model, "flexmoe_observe"):
            for i in range(index + 1):
                self.forward(i, found)
            if not self.backward_wanted:
                return
            given = self.files.read(_output(index), places)
            ones = [
                torch.ones_like(part) if part is not None and part.is_floating_point() else None
                for part in tensors_of(given)
            ]
            self.files.write(_gradient(index), places, same_form(given, ones))
            self.backward(index, found)

    def forward(self, index: int, found: Evidence) -> None:
        """What layer ``index`` gives; observed here if no gradients are wanted."""
        seen = None if self.backward_wanted else found
        with self._observed(index, seen) as observer, torch.no_grad():
            for batch in self.batches:
                self._in_parts(batch, observer, seen, lambda part: self._forward_part(index, part))

    def _forward_part(self, index: int, part: range) -> None:
        given = self.files.read(_output(index - 1), part) if index else None
        given = run_layer(self.loader, index, given, self._ids(part))
        self.files.write(_output(index), part, given)

    def head(self, index: int, found: Evidence) -> None:
        """The gradient of the loss by what the last layer, ``index``, gave."""
        for batch in self.batches:
            self._in_parts(batch, None, None, lambda part: self._head_part(index, part))

    def _head_part(self, index: int, part: range) -> None:
        given, ids = _leaves(self.files.read(_output(index), part)), self._ids(part)
        for logits, targets in self._logits(given, ids):
            loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="sum")
            if not torch.isfinite(loss):
                raise not_finite(self.loader, index + 1, given, ids)
            loss.backward()
        self.files.write(_gradient(index), part, _gradients(given))

    def _logits(self, given: Output, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Logits [n, c, V] and the tokens [n, c] that they predict, of a part of the positions at
        a time where the model can do so."""
        last, positions = len(self.loader.layers), ids.shape[1] - 1
        if "logits_to_keep" not in inspect.signature(self.loader.model.forward).parameters:
            yield run_layer(self.loader, last, given, ids).logits[:, :-1], ids[:, 1:]
            return
        for kept in torch.arange(positions, device=ids.device).split(
            max(1, self.chunk // len(ids))
        ):
            yield (
                run_layer(self.loader, last, given, ids, logits_to_keep=kept).logits,
                ids[:, kept + 1],
            )

    def backward(self, index: int, found: Evidence) -> None:
        """The gradient by what layer ``index`` got, from that by what it gave; observed here."""
        of_weights = any(s.when == "weights" for s in self.wanted)
        with self._observed(index, found) as observer:
            weights = observer.layer.parameters if observer and of_weights else {}
            for parameter in weights.values():
                parameter.requires_grad_(True)
            for batch in self.batches:
                self._in_parts(
                    batch, observer, found, lambda part: self._backward_part(index, part)
                )
                for name, parameter in weights.items():
                    if observer and parameter.grad is not None:
                        observer.add_weights(name, parameter, batch.ids[:, 1:].numel())

    def _backward_part(self, index: int, part: range) -> None:
        given = _leaves(self.files.read(_output(index - 1), part)) if index else None
        with torch.enable_grad():
            output = run_layer(self.loader, index, given, self._ids(part))
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

    @contextmanager
    def _observed(self, index: int, found: Evidence | None) -> Iterator[Observer | None]:
        """The layer is in memory inside the block. Its experts, if it has any, are observed, or
        computed in the same way where nothing is ``found`` out."""
        with self.loader.resident(index):
            if index not in self.loader.experts:
                yield None
                return
            layer = self.loader.experts[index]
            observer = None
            if found is not None:
                observer = Observer(layer, self.wanted, self.earlier.get(index))
            layer.module.flexmoe_observer = observer or unchanged
            try:
                with around_experts([layer], self.wanted if observer else ()) as around:
                    if observer is not None:
                        observer.around = around[index]
                    yield observer
            finally:
                del layer.module.flexmoe_observer
                for statistics in found.sources.values() if found else ():
                    statistics[index].to("cpu")

    def _in_parts(
        self,
        batch: Batch,
        observer: Observer | None,
        found: Evidence | None,
        work: Callable[[range], None],
    ) -> None:
        """Do ``work`` on a batch by micro-batches, smaller ones from then on when memory runs out;
        the observer adds to what is ``found`` of the batch's source."""
        before: dict[str, Tensor] = {}
        if observer is not None and found is not None:
            observer.stats = found.sources[batch.source][observer.layer.index]
            observer.stats.to(self.loader.device)
            before = {name: value.clone() for name, value in observer.stats.values.items()}

        def run(size: int) -> None:
            if observer is not None:  # forget what a try that ran out of memory has added
                observer.stats.values = {name: value.clone() for name, value in before.items()}
                for parameter in observer.layer.parameters.values():
                    parameter.grad = None
            for part in _split(batch.places, size):
                work(part)

        if observer is not None and any(s.whole for s in self.wanted):
            run(len(batch.places))
        else:
            self.micro.run(run, len(batch.places))


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
