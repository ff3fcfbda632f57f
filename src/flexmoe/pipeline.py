"""The main job: a MoE checkpoint becomes a family. Observe, rank, allocate or learn, write."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexmoe.actions import ActionConfig, learn_widths
from flexmoe.allocate import allocate, allocate_experts, order_of, widths_from_path
from flexmoe.config import SETTINGS_OF, CompressConfig, check_config
from flexmoe.data import Windows
from flexmoe.environment import hardware, versions
from flexmoe.evidence import FILE_NAME, Evidence, gather
from flexmoe.experts import expert_layers
from flexmoe.exporter import check_room, write_family
from flexmoe.family import attach, check_finite, load_stock, pick_device
from flexmoe.learn import LearnConfig, learn_positions
from flexmoe.methods import Text, find_method, score_layers, score_model
from flexmoe.observe import observe
from flexmoe.plan import JSON_NAME, LayerRecord, Plan, Recipe
from flexmoe.prepare import Prepared, prepare
from flexmoe.progress import Track, silent
from flexmoe.rco import RcoConfig, learn_order
from flexmoe.reference import add_reference
from flexmoe.reports.provenance import given
from flexmoe.resume import Saved, Work
from flexmoe.routing.rules import mean_outputs
from flexmoe.sequential import score_sequential
from flexmoe.sharding import gathered, shard_model
from flexmoe.statistics import Statistics, thin_experts
from flexmoe.streamed.fit import check_memory, gather_within
from flexmoe.streamed.layer_loader import LayerLoader
from flexmoe.training import by_first

# show how many experts a token is sent to, where no text is read
TWO_TOKENS = Windows(torch.zeros(1, 2, dtype=torch.long), "", ("",), torch.zeros(1))


@dataclass(kw_only=True)
class Ranked(Prepared):
    """A model in memory (on the meta device if it was observed layer by layer) with its channels
    in order, and what is known of them.

    ``score`` and ``order`` [E, I] of every layer describe the channels as they stand in ``model``:
    ``order`` is their original index. ``evidence`` is what the pass saw, None without text;
    ``constant`` the mean outputs [E, H] of experts, if the router rule needs them.
    """

    model: PreTrainedModel
    evidence: Evidence | None
    layers: dict[int, LayerRecord]
    score: dict[int, Tensor]
    order: dict[int, Tensor]
    constant: dict[int, Tensor]
    recipe: Recipe


def rank_channels(model: str | Path, config: CompressConfig, track: Track = silent) -> Ranked:
    """Observe the model on the calibration text, score its channels and put them in order."""
    return rank(prepare(model, config), track)


class Scored(NamedTuple):
    """What the pass gives, and the scores made of it. Without text there is no evidence."""

    network: PreTrainedModel
    evidence: Evidence | None
    statistics: Statistics
    score: dict[int, Tensor]


def _observe_whole(ready: Prepared, track: Track, saved: Saved | None) -> Scored:
    config, windows, method = ready.config, ready.windows, find_method(ready.config.method)
    # float32 on the CPU, where it is as fast; the checkpoint's own dtype on an accelerator
    dtype = torch.float32 if pick_device(config.device).type == "cpu" else "auto"
    network = load_stock(ready.source, device="cpu" if config.shard else config.device, dtype=dtype)
    check_finite(network)
    layers = expert_layers(network)
    if config.shard:
        shard_model(network, layers, pick_device(config.device))
    evidence, score = None, dict[int, Tensor]()
    if windows and config.sequential is not None:
        score, statistics = score_sequential(
            network,
            windows.ids,
            method,
            config.sequential,
            router=config.router,
            batch_size=ready.batch_size,
            seed=config.seed,
            track=track,
        )
        return Scored(network, None, statistics, score)
    if windows:
        evidence = gather(
            network,
            windows,
            config.needs,
            batch_size=ready.batch_size,
            seed=config.seed,
            saved=saved,
            track=track,
        )
        statistics = evidence.mixed()
    else:
        statistics = observe(network, TWO_TOKENS.ids, config.needs, seed=config.seed)
    if config.reference is not None:
        add_reference(statistics, layers, config.reference)
    if method.learns:
        assert windows is not None
        text = Text(windows.ids, ready.batch_size, config.seed, track)
        return Scored(network, evidence, statistics, score_model(method, network, statistics, text))
    for layer in layers:
        with gathered(network, layer):  # a method may read the layer's weights
            score |= score_layers(method, [layer], statistics)
    return Scored(network, evidence, statistics, score)


def _observe_by_layer(ready: Prepared, track: Track, saved: Saved | None) -> Scored:
    """The same within ``config.memory``; the model is on the meta device afterwards."""
    config, windows, method = ready.config, ready.windows, find_method(ready.config.method)
    assert config.memory is not None
    device = pick_device(config.device)
    loader = LayerLoader(ready.source, device, torch.float32 if device.type == "cpu" else None)
    check_memory(loader, config.memory)
    with loader, TemporaryDirectory() as folder:
        evidence = gather_within(
            config.memory,
            loader,
            windows or TWO_TOKENS,
            config.needs,
            batch_size=ready.batch_size,
            seed=config.seed,
            saved=saved or Work(Path(folder) / "pass", {}).stage("observe"),
            track=track,
        )
        statistics = evidence.mixed()
        if config.reference is not None:
            add_reference(statistics, list(loader.experts.values()), config.reference)
        score: dict[int, Tensor] = {}
        for i, layer in loader.experts.items():
            with loader.resident(i):
                score |= score_layers(method, [layer], statistics)
    return Scored(loader.model, evidence if windows else None, statistics, score)


def rank(ready: Prepared, track: Track = silent, saved: Saved | None = None) -> Ranked:
    """`rank_channels` for what has been prepared; ``saved`` keeps what the pass saw."""
    see = _observe_whole if ready.config.memory is None else _observe_by_layer
    return put_in_order(ready, see(ready, track, saved))


def put_in_order(ready: Prepared, scored: Scored) -> Ranked:
    """Put the channels of the model in memory in the order of their scores."""
    config, source, windows = ready.config, ready.source, ready.windows
    network, evidence, statistics, score = scored
    score = dict(score)
    layers = expert_layers(network)
    unit = find_method(config.method).unit
    for layer in layers if unit == "expert" else ():  # its channels share its fate
        score[layer.index] = score[layer.index][:, None].expand(-1, layer.I)
    order = {i: order_of(s) for i, s in score.items()}
    for layer in layers:  # without effect where the model is on the meta device
        layer.permute_(order[layer.index])
    records = {
        layer.index: LayerRecord(
            **vars(layer.shape), experts_per_token=statistics[layer.index].experts_per_token
        )
        for layer in layers
    }
    settings: dict[str, float | int | str] = {"batch_size": ready.batch_size}
    if config.reference is not None:
        settings["reference"] = config.reference
    if config.sequential is not None:
        settings["sequential"] = config.sequential
    return Ranked(
        **vars(ready),
        model=network,
        evidence=evidence,
        layers=records,
        score={i: s.gather(1, order[i].long()) for i, s in score.items()},
        order=order,
        constant=mean_outputs(statistics) if config.router == "constant" else {},
        recipe=Recipe(
            base_model=ready.base_model,
            model_type=ready.model_type,
            revision=source.name if source.parent.name == "snapshots" else None,
            weights_sha256=ready.weights_sha256,
            method=config.method,
            allocate=config.allocator,
            unit=unit,
            router=config.router,
            router_groups=ready.router_groups,
            settings=settings,
            data=windows.spec if windows else "",
            data_sha256=windows.sha256 if windows else "",
            samples=len(windows.ids) if windows else 0,
            seq_len=windows.ids.shape[1] if windows else 0,
            seed=config.seed,
            thin_experts=thin_experts(statistics) if windows else {},
            versions=versions(),
            hardware=hardware(pick_device(config.device)),
        ),
    )


def make_plan(
    ranked: Ranked, allocator: str, track: Track = silent, saved: Saved | None = None
) -> Plan:
    """Widths for all budgets by one allocator; those that learn do so on the calibration windows.

    The plan's order is that of the scores, or what learning made of it. ``saved`` keeps the state
    of learning.
    """
    config = ranked.config
    shapes = {i: record.shape for i, record in ranked.layers.items()}
    budgets = (0.0, *sorted(set(config.pruned)))
    settings = dict(ranked.recipe.settings)
    score = ranked.score
    learn: LearnConfig | ActionConfig | RcoConfig | None = None
    if allocator in SETTINGS_OF:
        wanted = SETTINGS_OF[allocator]
        learn = config.learn if isinstance(config.learn, wanted) else wanted()
        settings |= {f"learn_{name}": str(value) for name, value in vars(learn).items()}
    ids = ranked.windows.ids if ranked.windows else torch.empty(0)
    if isinstance(learn, LearnConfig):
        score = learn_positions(
            ranked.model,
            ids,
            score,
            learn,
            batch_size=ranked.batch_size,
            micro_batch=config.micro_batch,
            checkpointing=config.checkpointing,
            seed=config.seed,
            saved=saved,
            track=track,
        )
    if isinstance(learn, RcoConfig):
        of_units = {i: s[:, 0] if ranked.recipe.unit == "expert" else s for i, s in score.items()}
        found = learn_order(
            ranked.model, ids, of_units, budgets[1:], learn, seed=config.seed, track=track
        )
        score = {i: f.view(len(f), -1).expand_as(score[i]) for i, f in found.items()}
    name = "global" if allocator in SETTINGS_OF else allocator
    if isinstance(learn, ActionConfig):
        _arrange(ranked, {i: order_of(s).long() for i, s in score.items()})  # prefixes of the order
        score = ranked.score
        path = learn_widths(
            ranked.model,
            ids,
            learn,
            batch_size=ranked.batch_size,
            seed=config.seed,
            track=track,
        )
        width = widths_from_path(shapes, score, path, budgets, ranked.quantum)
    elif ranked.recipe.unit == "expert":
        score_E = {i: s[:, 0] for i, s in score.items()}
        K = {i: record.experts_per_token for i, record in ranked.layers.items()}
        width = allocate_experts(name, shapes, score_E, budgets, ranked.router_groups, K)
    else:
        width = allocate(name, shapes, score, budgets, ranked.quantum)
    made = {"allocate": allocator, "settings": settings}
    asked = config.allocate if allocator == config.allocator else allocator
    made["options"] = given(dataclasses.replace(config, allocate=asked, learn=learn))
    return Plan(
        layers=ranked.layers,
        order={i: ranked.order[i].gather(1, order_of(s).long()) for i, s in score.items()},
        width=width,
        budgets=budgets,
        quantum=ranked.quantum,
        recipe=ranked.recipe.model_copy(update=made),
        bytes_full=ranked.bytes_full,
        bytes_per_parameter=ranked.bytes_per_parameter,
        constant=ranked.constant,
    )


def _arrange(ranked: Ranked, place: dict[int, Tensor]) -> None:
    """Put the channels of the model in memory into the places [E, I] of every layer."""
    for layer in expert_layers(ranked.model):
        layer.permute_(place[layer.index])
    ranked.order = {i: o.gather(1, place[i]) for i, o in ranked.order.items()}
    ranked.score = {i: s.gather(1, place[i]) for i, s in ranked.score.items()}


def attach_plan(ranked: Ranked, plan: Plan) -> None:
    """Give the model in memory one of its plans: its channels in the plan's order, at budget 0."""
    stands = {i: order.long().argsort(1) for i, order in ranked.order.items()}
    _arrange(ranked, {i: stands[i].gather(1, plan.order[i].long()) for i in stands})
    attach(ranked.model, plan, ranked=True)


def compress(
    model: str | Path,
    out: str | Path,
    config: CompressConfig | None = None,
    *,
    track: Track = silent,
) -> Plan:
    """Turn a MoE checkpoint into a family folder ``out``; returns its plan.

    ``model`` is a folder, a hub id or ``tiny``. Nothing half-written is left when it fails. A run
    that was killed goes on from its last state when it is started again with the same settings. Of
    several processes (see `training.process_group`) the first one writes.
    """
    config = config or CompressConfig()
    check_config(config)
    work = Work(out, {"model": str(model), **dataclasses.asdict(config)})
    made = Path(out).expanduser()
    if work.begun and (made / JSON_NAME).is_file():  # killed when all was done
        by_first(work.clear)
        return Plan.load(made)
    check_room(model, out)
    ready = prepare(model, config)
    with work.on(**ready.inputs):
        plan, evidence = _plan(ready, work, track)
    with work.writing():
        by_first(lambda: write_family(ready.source, plan, out, track, evidence))
    work.clear()
    return plan


def _plan(ready: Prepared, work: Work, track: Track) -> tuple[Plan, Evidence | None]:
    """The plan and what it rests on, computed or as an earlier run kept them."""
    kept = work.path / "plan"
    if (kept / JSON_NAME).is_file():
        plan = Plan.load(kept)
        read = (kept / FILE_NAME).is_file()
        return plan, Evidence.load(kept, plan.recipe.data_sha256) if read else None
    ranked = rank(ready, track, work.stage("observe"))
    plan = make_plan(ranked, ready.config.allocator, track, work.stage("learn"))
    evidence = ranked.evidence

    def keep() -> None:
        kept.mkdir(exist_ok=True)
        if evidence:
            evidence.save(kept)
        plan.save(kept)

    by_first(keep)
    return plan, evidence
