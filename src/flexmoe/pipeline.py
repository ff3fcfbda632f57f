"""The main job: a MoE checkpoint becomes a family. Observe, rank, allocate or learn, write."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

import flexmoe
from flexmoe.actions import ActionConfig, learn_widths
from flexmoe.allocate import allocate, order_of, widths_from_path
from flexmoe.config import SETTINGS_OF, CompressConfig, check_config
from flexmoe.evidence import Evidence, gather
from flexmoe.experts import expert_layers
from flexmoe.exporter import check_room, write_family
from flexmoe.family import attach, load_stock, pick_device
from flexmoe.learn import LearnConfig, learn_positions
from flexmoe.methods import find_method, score_layers
from flexmoe.plan import JSON_NAME, LayerRecord, Plan, Recipe
from flexmoe.prepare import Prepared, prepare
from flexmoe.progress import Track, silent
from flexmoe.resume import Saved, Work
from flexmoe.sharding import gathered, shard_model
from flexmoe.statistics import observe, thin_experts
from flexmoe.training import by_first


@dataclass(kw_only=True)
class Ranked(Prepared):
    """A model in memory with its channels in order, and what is known of them.

    ``score`` and ``order`` [E, I] of every layer describe the channels as they stand in ``model``:
    ``order`` is their original index. ``evidence`` is what the pass saw, None without text.
    """

    model: PreTrainedModel
    evidence: Evidence | None
    layers: dict[int, LayerRecord]
    score: dict[int, Tensor]
    order: dict[int, Tensor]
    recipe: Recipe


def rank_channels(model: str | Path, config: CompressConfig, track: Track = silent) -> Ranked:
    """Observe the model on the calibration text, score its channels and put them in order."""
    return rank(prepare(model, config), track)


def rank(ready: Prepared, track: Track = silent, saved: Saved | None = None) -> Ranked:
    """`rank_channels` for what has been prepared; ``saved`` keeps what the pass saw."""
    config, source, windows = ready.config, ready.source, ready.windows
    method = find_method(config.method)
    # float32 on the CPU, where it is as fast; the checkpoint's own dtype on an accelerator
    dtype = torch.float32 if pick_device(config.device).type == "cpu" else "auto"
    network = load_stock(source, device="cpu" if config.shard else config.device, dtype=dtype)
    layers = expert_layers(network)
    if config.shard:
        shard_model(network, layers, pick_device(config.device))
    evidence = None
    if windows:
        evidence = gather(
            network,
            windows,
            method.needs,
            batch_size=ready.batch_size,
            seed=config.seed,
            saved=saved,
            track=track,
        )
        statistics = evidence.mixed()
    else:  # two tokens show how many experts a token is sent to
        two = torch.zeros(1, 2, dtype=torch.long)
        statistics = observe(network, two, method.needs, seed=config.seed)
    score: dict[int, Tensor] = {}
    for layer in layers:
        with gathered(network, layer):  # a method may read the layer's weights
            score |= score_layers(method, [layer], statistics)
    order = {i: order_of(s) for i, s in score.items()}
    for layer in layers:
        layer.permute_(order[layer.index])
    records = {
        layer.index: LayerRecord(
            **vars(layer.shape), experts_per_token=statistics[layer.index].experts_per_token
        )
        for layer in layers
    }
    return Ranked(
        **vars(ready),
        model=network,
        evidence=evidence,
        layers=records,
        score={i: s.gather(1, order[i].long()) for i, s in score.items()},
        order=order,
        recipe=Recipe(
            base_model=ready.base_model,
            model_type=ready.model_type,
            revision=source.name if source.parent.name == "snapshots" else None,
            weights_sha256=ready.weights_sha256,
            method=config.method,
            allocate=config.allocate,
            settings={"batch_size": ready.batch_size},
            data=windows.spec if windows else "",
            data_sha256=windows.sha256 if windows else "",
            samples=len(windows.ids) if windows else 0,
            seq_len=windows.ids.shape[1] if windows else 0,
            seed=config.seed,
            thin_experts=thin_experts(statistics) if windows else {},
            versions={
                "flexmoe": flexmoe.__version__,
                "torch": torch.__version__,
                "transformers": transformers_version,
            },
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
    learn: LearnConfig | ActionConfig | None = None
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
    else:
        name = "global" if allocator == "learned" else allocator
        width = allocate(name, shapes, score, budgets, ranked.quantum)
    return Plan(
        layers=ranked.layers,
        order={i: ranked.order[i].gather(1, order_of(s).long()) for i, s in score.items()},
        width=width,
        budgets=budgets,
        quantum=ranked.quantum,
        recipe=ranked.recipe.model_copy(update={"allocate": allocator, "settings": settings}),
        bytes_full=ranked.bytes_full,
        bytes_per_parameter=ranked.bytes_per_parameter,
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
        read = ready.windows is not None
        return plan, Evidence.load(kept, plan.recipe.data_sha256) if read else None
    ranked = rank(ready, track, work.stage("observe"))
    plan = make_plan(ranked, ready.config.allocate, track, work.stage("learn"))
    evidence = ranked.evidence

    def keep() -> None:
        kept.mkdir(exist_ok=True)
        if evidence:
            evidence.save(kept)
        plan.save(kept)

    by_first(keep)
    return plan, evidence
