"""Compare methods: one model in memory, one pass of statistics for all methods of a cost, one
evaluation for every plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import flexmoe
from flexmoe.checkpoint import meta_model
from flexmoe.comparison.entries import ALL, Entry, chosen
from flexmoe.comparison.inputs import CompareConfig, Held, read_held, settings_of
from flexmoe.comparison.results import Results
from flexmoe.config import check_config
from flexmoe.data import pick_batch_size, pick_seq_len
from flexmoe.environment import hardware, versions
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.members import budgets_of
from flexmoe.evidence import gather
from flexmoe.experts import expert_layers, routed_parameters
from flexmoe.family import check_finite, load_stock, pick_device
from flexmoe.headers import resolve
from flexmoe.learn import check_halves
from flexmoe.memory import MostHeld, give_back
from flexmoe.methods import Text, score_model
from flexmoe.observe import observe
from flexmoe.pipeline import TWO_TOKENS, Ranked, Scored, attach_plan, make_plan, put_in_order
from flexmoe.prepare import Prepared, pick_quantum, prepare, router_groups
from flexmoe.progress import Track, silent
from flexmoe.reference import add_reference
from flexmoe.routing.rules import restore
from flexmoe.statistics import Statistics, empty_statistics, find_statistics

COSTS = (
    "no data",
    "two checkpoints",
    "forward",
    "backward",
    "weight gradients",
    "training",
)  # least first

SHARED = ("rco",)  # allocations of which a budget depends on which others are asked for

Say = Callable[[str], None]


def compare(
    model: str | Path,
    out: str | Path,
    config: CompareConfig,
    *,
    say: Say = lambda line: None,
    track: Track = silent,
) -> Results:
    """Measure every method at every budget and write the results to the file ``out``, see
    `Results`; what stands there already is not measured again. ``say`` is told what is left out.

    Methods that cannot run here are refused before the slow part; with 'all' they are left out.
    """
    entries = chosen(config.methods)
    if config.reference is not None and not any(entry.method.reference for entry in entries):
        raise FlexmoeError("reference has no effect: no method looks at a second checkpoint")
    source = resolve(model)
    meta = meta_model(source)
    entries = _those(entries, lambda entry: _check(entry, meta, config), config, say)
    # the text is read whoever looks at it: others may be added to the file later
    ready = prepare(model, replace(config.common, method="frequency", reference=None))
    held = read_held(source, meta, config, track)
    results = Results.open(out, settings_of(model, ready, held, config))
    entries = _those(entries, lambda entry: _check_asked(entry, results, config), config, say)
    left = [e for e in entries if _missing(e, results, config)]
    if results.base is not None and not left:
        return results
    dtype = torch.float32 if pick_device(config.device).type == "cpu" else "auto"
    network = load_stock(source, device=config.device, dtype=dtype)
    check_finite(network)
    job = _Job(network, ready, config, held, results, say, track)
    left = _those(left, job.rehearse, config, say)
    job.measure_base()
    for cost in COSTS:
        if group := [entry for entry in left if entry.method.cost == cost]:
            job.measure_group(group)
    return results


def _missing(entry: Entry, results: Results, config: CompareConfig) -> list[float]:
    """The budgets that there is no line of yet."""
    sha256 = entry.method.sha256
    return [share for share in config.pruned if not results.done(entry.name, share, sha256)]


def _check_asked(entry: Entry, results: Results, config: CompareConfig) -> None:
    """`FlexmoeError` for budgets to add to an entry whose plan learns all that are asked for in one
    run: with others it is another plan. Rows that do not say were asked for as they are."""
    rows = [row for row in results.rows if row["method"] == entry.name]
    if entry.allocate not in SHARED or not rows or not _missing(entry, results, config):
        return
    before = rows[0].get("asked", sorted(row["pruned"] for row in rows))
    if before != sorted(config.pruned):
        raise FlexmoeError(
            f"'{results.path}' has {entry.name} at {before}, which share the steps of one run: "
            "with other budgets these would be others. Give another --json, or ask for the same"
        )


def _check(entry: Entry, meta: PreTrainedModel, config: CompareConfig) -> None:
    """`FlexmoeError` for what cannot run on a model of this shape."""
    own = entry.config(config.common)
    check_config(own)
    empty_statistics(expert_layers(meta), find_statistics(own.needs))
    router_groups(meta, own)
    if own.allocator == "learned":
        check_halves(pick_batch_size(own.batch_size, pick_seq_len(own.seq_len, meta.config)))


def _those(
    entries: Iterable[Entry], check: Callable[[Entry], None], config: CompareConfig, say: Say
) -> list[Entry]:
    """The entries that pass a check. One that was asked for by name must."""
    found = []
    for entry in entries:
        try:
            check(entry)
        except FlexmoeError as error:
            if ALL not in config.methods or entry.name in config.methods:
                raise
            say(f"left out: {entry.name}: {error}")
        else:
            found.append(entry)
    return found


@dataclass(frozen=True)
class _Job:
    """The model in memory, all that is measured on it, and where results go."""

    network: PreTrainedModel
    ready: Prepared
    config: CompareConfig
    held: Held
    results: Results
    say: Say
    track: Track

    def rehearse(self, entry: Entry) -> None:
        """Two tokens: `FlexmoeError` if what a method looks at is not found in this model."""
        needs = entry.config(self.config.common).needs
        if not entry.method.learns:
            self.score(entry, observe(self.network, TWO_TOKENS.ids, needs))

    def score(self, entry: Entry, statistics: Statistics) -> dict[int, Tensor]:
        """The method's scores by layer."""
        layers = expert_layers(self.network)
        if entry.method.reference and self.config.reference is not None:
            add_reference(statistics, layers, self.config.reference)
        windows, config = self.ready.windows, self.config
        assert windows is not None
        text = Text(windows.ids, self.ready.batch_size, config.seed, self.track)
        return score_model(entry.method, self.network, statistics, text)

    def measure_base(self) -> None:
        """The line of the model as it is, unless there is one."""
        if self.results.base is not None:
            return
        about = {
            "base": True,
            "routed_parameters": routed_parameters(self.network),
            "bytes": self.ready.bytes_full,
            "hardware": hardware(self.network.device),
            "dtype": str(self.network.dtype).removeprefix("torch."),
            "versions": versions(),
        }
        self.results.add({**about, **self.held.rows({0.0: lambda: self.network})[0.0]})

    def measure_group(self, group: list[Entry]) -> None:
        """One pass for entries of the same cost, then their plans one by one. What goes wrong with
        one of them is said, and the others go on."""
        needs = tuple(dict.fromkeys(n for e in group for n in e.config(self.config.common).needs))
        give_back()  # else what earlier work left to the process would count as this pass's own
        begin = time.monotonic()
        with MostHeld(self.network.device) as most:
            statistics = self._observe(needs)
        calibration = {
            "cost": group[0].method.cost,
            "seconds": round(time.monotonic() - begin, 2) if needs else 0.0,
            "most_held": most.bytes,
            "shared_by": len(group),
        }
        for entry in group:
            try:
                self.measure(entry, statistics, calibration)
            except FlexmoeError as error:
                self.say(f"{entry.name}: {error}")

    def _observe(self, needs: tuple[str, ...]) -> Statistics:
        seed = self.config.seed
        if not needs:
            return observe(self.network, TWO_TOKENS.ids, (), seed=seed)
        assert self.ready.windows is not None
        size = self.ready.batch_size
        return gather(
            self.network, self.ready.windows, needs, batch_size=size, seed=seed, track=self.track
        ).mixed()

    def measure(self, entry: Entry, statistics: Statistics, calibration: Mapping[str, Any]) -> None:
        """The plan of one entry, and a line of results for each budget that has none."""
        own, begin = entry.config(self.config.common), time.monotonic()
        shares = _missing(entry, self.results, self.config)
        score = self.score(entry, statistics)
        fitted = replace(
            self.ready,
            config=own,
            windows=self.ready.windows if own.needs_data else None,
            quantum=pick_quantum(own, [layer.I for layer in expert_layers(self.network)]),
            router_groups=router_groups(self.network, own),
        )
        ranked = put_in_order(fitted, Scored(self.network, None, statistics, score))
        try:
            plan = make_plan(ranked, own.allocator, self.track)
            seconds = time.monotonic() - begin
            attach_plan(ranked, plan)
            rows = self.held.rows(budgets_of(self.network, [0.0, *shares]))
        finally:
            _as_before(ranked)
        about = {
            "method": entry.name,
            "unit": entry.method.unit,
            "allocate": own.allocator,
            "router": entry.router,
            "paper": entry.method.paper,
            "calibration": calibration,
            "plan_seconds": round(seconds, 2),
            "version": flexmoe.__version__,
        }
        if entry.allocate in SHARED:
            about["asked"] = sorted(self.config.pruned)
        if entry.method.sha256:
            about["method_sha256"] = entry.method.sha256
        for share in shares:
            self.results.add({**about, **plan.member(share).model_dump(), **rows[share]})


def _as_before(ranked: Ranked) -> None:
    """The model without a plan, its channels where they were."""
    model = ranked.model
    restore(model)
    model.__dict__.pop("flexmoe_plan", None)
    if hasattr(model, "flexmoe_stock"):
        model.set_experts_implementation(model.flexmoe_stock)
    for layer in expert_layers(model):
        layer.module.__dict__.pop("flexmoe_width_E", None)
        layer.permute_(ranked.order[layer.index].long().argsort(1))
