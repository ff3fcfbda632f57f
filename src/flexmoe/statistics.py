"""Statistics: named sums over tokens, which a pass over calibration data fills (`observe`).

A statistic is a decorated function. It returns a number per routed pair (and channel), and the
pass adds them up per expert in float64. All are sums (or maxima), so parts of a pass merge.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flexmoe.around import Pairs
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import ExpertLayer

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
        if name in STATISTICS:
            refuse_taken(f"statistic '{name}'", STATISTICS[name].function, function)
        STATISTICS[name] = Statistic(name, when, merge, function, reads, after, whole)
        return function

    return register


def refuse_taken(what: str, before: Callable[..., object], now: Callable[..., object]) -> None:
    """`FlexmoeError` if a name is given again in another file: one of the two would silently stand
    for the other."""
    there, here = _file_of(before), _file_of(now)
    if there != here:
        raise FlexmoeError(
            f"{what} stands in {there} already, and in {here}: give yours another name"
        )


def _file_of(function: Callable[..., object]) -> str:
    module = sys.modules.get(function.__module__)
    return getattr(module, "__file__", None) or function.__module__  # none in a notebook


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

    def mean(self, name: str) -> Tensor:
        """A sum over an expert's tokens [E, ...], divided by their number; zeros for one that had
        none. Of a mixture, whose sources are scaled, the number may lie below 1."""
        value = self[name]
        count = self["count_E"].view(-1, *[1] * (value.dim() - 1))
        return torch.where(count > 0, value / count, 0.0)

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


def token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Summed next-token cross-entropy in float32, nats; ``ids`` [n, t], ``logits`` [n, t, V]."""
    predicted = logits[:, :-1].flatten(0, 1).float()
    return F.cross_entropy(predicted, ids[:, 1:].flatten(), reduction="sum")


def goes_backward(wanted: Iterable[Statistic]) -> bool:
    """Whether gradients are needed for these."""
    return any(s.when in ("backward", "weights") for s in wanted)


def beside(earlier: Statistics, later: Statistics) -> Statistics:
    """The statistics of two passes over the same data as one."""
    found: Statistics = {}
    for i, stats in later.items():
        values = (earlier[i].values if i in earlier else {}) | stats.values
        found[i] = LayerStatistics(values, stats.tokens, stats.batches, stats.seed)
    return found


def thin_experts(statistics: Statistics) -> dict[int, list[int]]:
    """Experts that saw fewer than `THIN` tokens, by layer: their ranking is a guess."""
    return {
        i: experts
        for i, stats in statistics.items()
        if (experts := (stats["count_E"] < THIN).nonzero().flatten().tolist())
    }
