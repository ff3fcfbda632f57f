"""Statistics: named sums over tokens, and the one pass over calibration data that fills them.

A statistic is a decorated function. It returns a number per routed pair (and channel), and the
pass adds them up per expert in float64. All are sums (or maxima), so parts of a pass merge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.around import Around, Pairs, around_experts
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import ExpertLayer, Routing, Seen, expert_layers, experts_function
from flexmoe.memory import MicroBatch
from flexmoe.progress import Track, silent
from flexmoe.sharding import is_sharded

MOST = 16  # experts of which all subsets are tried
READABLE = {"router", "residual", "ids", "target"}  # around the experts
THIN = 100  # fewer tokens than this are thin evidence for an expert


@dataclass(frozen=True)
class Statistic:
    """A named sum or maximum; the name ends in the letters of its shape: ``fisher_EI`` (``C`` are
    all subsets of the experts, ``V`` the vocabulary: 0 or 1 for each token of it).

    ``when``: ``forward`` and ``backward`` functions map `Pairs` to a row for each pair ([S], [S, I]
    or [S, H]), which the pass adds up per expert; ``batch`` ones map `Pairs` to the sums
    themselves; ``weights`` ones map (weight, gradient of the batch-mean loss), both [E, I, ...], to
    [E, I] once a batch. ``merge``: ``sum`` or ``max``. ``reads``: ``router``, ``residual``, ``ids``
    and ``target``, if the function looks at them. ``after``: statistics that must be known before;
    the function gets the `LayerStatistics` of an earlier pass as second argument. ``whole``: a
    ``batch`` one that is no sum over tokens, so that a batch never goes in parts.
    """

    name: str
    when: str
    merge: str
    function: Callable[..., Tensor]
    reads: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    whole: bool = False

    def zeros(self, layer: ExpertLayer) -> Tensor:
        """Its value [E, ...] before any token."""
        if self.name.endswith("_C") and layer.E > MOST:
            raise FlexmoeError(
                f"layer {layer.index} has {layer.E} experts: all their subsets can be tried up to "
                f"{MOST} of them, use another method (see: flexmoe methods)"
            )
        sizes = {"E": layer.E, "I": layer.I, "H": layer.H, "C": 2**layer.E}
        letters = self.name.rpartition("_")[2]
        if "V" in letters:
            assert layer.model is not None
            sizes["V"] = layer.model.config.get_text_config().vocab_size
        # a vocabulary is large, and a flag takes no more than a byte
        dtype = torch.uint8 if "V" in letters else torch.float64
        return torch.zeros([sizes[letter] for letter in letters], dtype=dtype)


STATISTICS: dict[str, Statistic] = {}


def statistic(
    name: str,
    *,
    when: str,
    merge: str = "sum",
    reads: tuple[str, ...] = (),
    after: tuple[str, ...] = (),
    whole: bool = False,
) -> Callable:
    """Declare a statistic (see `Statistic`); methods ask for it by name in ``needs``."""
    known = {"forward", "backward", "batch", "weights"}
    if when not in known or merge not in ("sum", "max") or {*reads} - READABLE:
        raise FlexmoeError(
            f"statistic '{name}': when={when!r}, merge={merge!r}, reads={reads!r}; expected "
            f"{', '.join(sorted(known))}; sum or max; {', '.join(sorted(READABLE))}"
        )
    letters = name.rpartition("_")[2]
    if letters != "C" and (not letters.startswith("E") or {*letters} - {*"EIHV"}):
        raise FlexmoeError(
            f"statistic '{name}': its name must end in its shape, such as {name}_E, {name}_EI"
        )

    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        STATISTICS[name] = Statistic(name, when, merge, function, reads, after, whole)
        return function

    return register


@statistic("count_E", when="batch")
def count(pairs: Pairs) -> Tensor:
    """Tokens routed to each expert: always there."""
    assert pairs.layer is not None
    return torch.bincount(pairs.all.routing.expert_S, minlength=pairs.layer.E)


@dataclass
class LayerStatistics:
    """Sums of one layer, on the CPU: ``stats["fisher_EI"]`` ... and always ``stats["count_E"]``,
    the routed tokens of every expert; plus the tokens and batches of the pass and its seed."""

    values: dict[str, Tensor]
    tokens: int = 0
    batches: int = 0
    seed: int = 0

    def __getitem__(self, name: str) -> Tensor:
        return self.values[name]

    @property
    def experts_per_token(self) -> int:
        """How many experts a token is sent to."""
        return round(float(self["count_E"].sum()) / max(self.tokens, 1))

    def to(self, device: torch.device | str) -> None:
        """Move the sums."""
        self.values = {name: value.to(device) for name, value in self.values.items()}

    def merge(self, other: LayerStatistics) -> None:
        """Add what another part of the pass saw."""
        for name, value in other.values.items():
            mine = self.values[name]
            self.values[name] = torch.maximum(mine, value) if is_max(name) else mine + value
        self.tokens += other.tokens
        self.batches += other.batches

    def scaled(self, factor: float) -> LayerStatistics:
        """As if ``factor`` times as many tokens of the same kind had been seen: sums grow with
        them, maxima stay."""
        values = {n: v.clone() if is_max(n) else v * factor for n, v in self.values.items()}
        tokens, batches = round(self.tokens * factor), round(self.batches * factor)
        return LayerStatistics(values, tokens, batches, self.seed)


Statistics = dict[int, LayerStatistics]


def is_max(name: str) -> bool:
    """Whether a statistic is a maximum over tokens, not a sum."""
    return name in STATISTICS and STATISTICS[name].merge == "max"


def empty_statistics(
    layers: Sequence[ExpertLayer], wanted: Sequence[Statistic], seed: int = 0
) -> Statistics:
    """Statistics that have seen nothing."""
    return {
        layer.index: LayerStatistics({s.name: s.zeros(layer) for s in wanted}, seed=seed)
        for layer in layers
    }


def find_statistics(names: Iterable[str]) -> list[Statistic]:
    """The declared statistics of these names and those they come after, in an order that works."""
    names = list(names)
    if not all(name in STATISTICS for name in names):
        from flexmoe.methods import all_methods

        all_methods()  # declares those that come with flexmoe
    for name in names:
        if name not in STATISTICS:
            raise did_you_mean(name, STATISTICS, "statistic")
    before = find_statistics(a for n in names for a in STATISTICS[n].after) if names else []
    return list(dict.fromkeys([*before, *(STATISTICS[name] for name in names)]))


def passes(names: Iterable[str]) -> list[list[Statistic]]:
    """What each pass over the data must fill: one pass, or as many as statistics come after
    others. The first one always counts tokens."""
    left = find_statistics(["count_E", *names])
    found: list[list[Statistic]] = []
    known: set[str] = set()
    while left:
        found.append([s for s in left if known.issuperset(s.after)])
        known |= {s.name for s in found[-1]}
        left = [s for s in left if s.name not in known]
    return found


class Observer:
    """Sits on one experts module during the pass and adds up in ``stats``, which stand where the
    module is. ``earlier`` are the layer's statistics of the passes before this one, ``around``
    follows what stands around the experts, where a statistic reads it."""

    stats: LayerStatistics

    def __init__(
        self,
        layer: ExpertLayer,
        wanted: Sequence[Statistic],
        earlier: LayerStatistics | None = None,
        around: Around | None = None,
    ):
        self.layer, self.wanted, self.earlier, self.around = layer, wanted, earlier, around

    def __call__(self, routing: Routing, h_SI: Tensor) -> Tensor:
        weight_S = routing.weight_S.detach()
        backward = [s for s in self.wanted if s.when == "backward"]
        if backward and torch.is_grad_enabled():
            if not h_SI.requires_grad:  # first MoE layer of a frozen model: the graph starts here
                h_SI = h_SI.requires_grad_()
            kept = h_SI.detach()
            h_SI.register_hook(
                lambda grad: self._add(backward, routing, Pairs(weight_S, kept, grad))
            )
        return h_SI

    @torch.no_grad()
    def see(self, seen: Seen) -> None:
        """Everything that went by in one call: statistics of the forward pass."""
        pairs = Pairs(seen.routing.weight_S, seen.h_SI, None, self.layer, seen, self.around)
        self._add([s for s in self.wanted if s.when == "forward"], seen.routing, pairs)
        for s in self.wanted:
            if s.when == "batch":
                value, into = self._value(s, pairs).double(), self.stats[s.name]
                into.copy_(torch.maximum(into, value) if s.merge == "max" else into + value)
        if self.around is not None:
            self.around.clear()

    def _value(self, s: Statistic, pairs: Pairs) -> Tensor:
        return s.function(pairs, self.earlier) if s.after else s.function(pairs)

    def _add(self, wanted: Sequence[Statistic], routing: Routing, pairs: Pairs) -> None:
        for s in wanted:
            value = self._value(s, pairs)
            exact = torch.float64 if value.dtype == torch.float64 else torch.float32
            into = self.stats[s.name]
            for e, a, b in routing.segments:
                if s.merge == "max":
                    into[e] = torch.maximum(into[e], value[a:b].amax(0))
                else:
                    into[e] += value[a:b].sum(0, dtype=exact)

    def add_weights(self, name: str, parameter: nn.Parameter, tokens: int) -> None:
        """Statistics of the weights' gradient, which is freed at once: one layer's lives."""
        assert parameter.grad is not None
        weights = self.layer.channel_major(name, parameter.detach())
        grads = self.layer.channel_major(name, parameter.grad)
        for s in self.wanted:
            if s.when == "weights":
                for weight, grad in zip(weights, grads, strict=True):
                    self.stats[s.name].add_(s.function(weight.float(), grad.float() / tokens))
        parameter.grad = None


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed next-token cross-entropy in float32, nats; ``ids`` [n, t], ``logits`` [n, t, V]."""
    predicted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="sum")


def goes_backward(wanted: Iterable[Statistic]) -> bool:
    """Whether gradients are needed for these."""
    return any(s.when in ("backward", "weights") for s in wanted)


Look = Callable[[Tensor, Statistics], None]


@contextmanager
def watched(
    model: nn.Module,
    wanted: Sequence[Statistic],
    earlier: Mapping[int, LayerStatistics] = MappingProxyType({}),
) -> Iterator[Look]:
    """Inside the block ``look(ids, into)`` runs the model on windows ``ids`` [n, t] and adds what
    its experts do to the statistics ``into``, which move to the model's device. ``earlier`` are
    those of the passes before this one.

    Forward only when nothing asks for gradients. All weights are frozen but those a ``weights``
    statistic needs, so the backward pass is cheaper than a plain one. The loss is the sum over
    tokens: a token counts the same in any batch. Where memory runs out a batch goes in parts,
    except for ``weights`` statistics, which look at the gradient of the whole batch, and those that
    are ``whole``.
    """
    layers = expert_layers(model)
    observers = [Observer(layer, wanted, earlier.get(layer.index)) for layer in layers]
    backward = goes_backward(wanted)
    of_weights = any(s.when == "weights" for s in wanted)
    in_one = of_weights or any(s.whole for s in wanted)
    trainable = {p for p in model.parameters() if p.requires_grad}
    handles, tokens, micro = [], 1, MicroBatch(sys.maxsize)
    model.requires_grad_(False)
    for observer in observers:
        observer.layer.module.flexmoe_observer = observer
        for name, parameter in observer.layer.parameters.items() if of_weights else ():
            parameter.requires_grad_(True)

            def collect(p: nn.Parameter, observer: Observer = observer, name: str = name) -> None:
                observer.add_weights(name, p, tokens)

            handles.append(parameter.register_post_accumulate_grad_hook(collect))
    device = next(model.parameters()).device

    def look(ids: Tensor, into: Statistics) -> None:
        nonlocal tokens
        tokens = ids[:, 1:].numel()
        for observer in observers:
            observer.stats = into[observer.layer.index]
            observer.stats.to(device)
        ids = ids.to(device)
        before = [dict(observer.stats.values) for observer in observers]

        def run(size: int) -> None:
            for observer, values in zip(observers, before, strict=True):  # as before a failed try
                observer.stats.values = {name: value.clone() for name, value in values.items()}
            for part in ids.split(size):
                loss = token_loss(model(input_ids=part, use_cache=False).logits, part)
                if not torch.isfinite(loss):
                    raise FlexmoeError(
                        "the model's loss on the calibration data is not finite: check that the "
                        "tokenizer belongs to the model, or run in float32"
                    )
                if backward:
                    loss.backward()

        if in_one or is_sharded(model):  # a batch as it is, or calls made by all together
            run(len(ids))
        else:
            micro.run(run, len(ids))
        for observer in observers:
            observer.stats.tokens += ids.numel()
            observer.stats.batches += 1

    try:
        with (
            around_experts(layers, wanted) as around,
            experts_function(model, "flexmoe_observe"),
            torch.set_grad_enabled(backward),
        ):
            for observer in observers:
                observer.around = around[observer.layer.index]
            yield look
    finally:
        for handle in handles:
            handle.remove()
        for observer in observers:
            del observer.layer.module.flexmoe_observer
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trainable)


def observe(
    model: nn.Module,
    ids: Tensor,
    names: Sequence[str],
    *,
    batch_size: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> Statistics:
    """One pass over windows ``ids`` [n, t] that fills the named statistics (more only where one
    comes after another)."""
    found: Statistics = {}
    for wanted in passes(names):
        part = empty_statistics(expert_layers(model), wanted, seed)
        with watched(model, wanted, found) as look:
            for batch in track(ids.split(batch_size), "observe"):
                look(batch, part)
        for stats in part.values():
            stats.to("cpu")
        found = beside(found, part)
    return found


def beside(earlier: Statistics, later: Statistics) -> Statistics:
    """The statistics of two passes over the same data as one."""
    found: Statistics = {}
    for i, stats in later.items():
        values = (earlier[i].values if i in earlier else {}) | stats.values
        found[i] = LayerStatistics(values, stats.tokens, stats.batches, stats.seed)
    return found


def thin_experts(statistics: Statistics, at_least: int = THIN) -> dict[int, list[int]]:
    """Experts that saw fewer than ``at_least`` tokens, by layer: their ranking is a guess."""
    return {
        i: experts
        for i, stats in statistics.items()
        if (experts := (stats["count_E"] < at_least).nonzero().flatten().tolist())
    }
