"""The main job: a MoE checkpoint becomes a family. Observe, rank, allocate or learn, write."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

import flexmoe
from flexmoe.actions import ActionConfig, learn_widths
from flexmoe.allocate import allocate, default_quantum, order_of, widths_from_path
from flexmoe.checkpoint import Checkpoint, meta_model, resolve
from flexmoe.config import SAMPLES, SETTINGS_OF, CompressConfig, check_config
from flexmoe.data import (
    Windows,
    calibration_windows,
    check_tokens,
    load_tokenizer,
    pick_batch_size,
    pick_seq_len,
)
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.exporter import check_room, write_family
from flexmoe.family import attach, load_stock, pick_device
from flexmoe.fit import check_weights, observe_within
from flexmoe.layer_loader import LayerLoader
from flexmoe.learn import LearnConfig, check_halves, learn_positions
from flexmoe.methods import find_method, score_layers
from flexmoe.plan import LayerRecord, Plan, Recipe
from flexmoe.progress import Track, silent
from flexmoe.resume import Saved, Work
from flexmoe.sharding import gathered, shard_model
from flexmoe.statistics import Statistics, observe, observe_shared, thin_experts
from flexmoe.trace import fingerprint, trace
from flexmoe.training import by_first, part_of, share


@dataclass(kw_only=True)
class Prepared:
    """All that is known before the weights are loaded.

    ``weights_sha256`` is their `trace.fingerprint`; ``bytes_full`` counts the checkpoint's
    tensors, ``bytes_per_parameter`` those of the experts. ``windows`` and ``tokenizer`` are None
    where no text is read.
    """

    config: CompressConfig
    base_model: str
    source: Path
    model_type: str
    weights_sha256: str
    tokenizer: Any
    windows: Windows | None
    batch_size: int
    quantum: int
    bytes_full: int
    bytes_per_parameter: int


@dataclass(kw_only=True)
class Ranked(Prepared):
    """A model in memory (on the meta device if it was observed layer by layer) with its channels
    in order, and what is known of them.

    ``score`` and ``order`` [E, I] of every layer describe the channels as they stand in ``model``:
    ``order`` is their original index.
    """

    model: PreTrainedModel
    layers: dict[int, LayerRecord]
    score: dict[int, Tensor]
    order: dict[int, Tensor]
    recipe: Recipe


def prepare(model: str | Path, config: CompressConfig) -> Prepared:
    """Check and read all that can be without the model's weights."""
    check_config(config)
    source = resolve(model)
    meta, checkpoint = meta_model(source), Checkpoint(source)
    traced = trace(checkpoint, meta)  # refuses weights it cannot find before the slow part
    narrowest = min(layer.shape.channels for layer in expert_layers(meta))
    quantum = default_quantum(narrowest) if config.quantum is None else config.quantum
    if quantum > narrowest:
        raise FlexmoeError(f"quantum {quantum} is wider than an expert of {narrowest} channels")
    tokenizer, windows, batch_size = None, None, 1
    if config.needs_data:
        tokenizer = load_tokenizer(source, meta.config)
        windows = calibration_windows(
            config.data or "tiny",
            tokenizer,
            samples=SAMPLES if config.samples is None else config.samples,
            seq_len=pick_seq_len(config.seq_len, meta.config),
            seed=config.seed,
        )
        check_tokens(windows.ids, meta.config)
        batch_size = pick_batch_size(config.batch_size, windows.ids.shape[1])
        share(windows.ids.split(batch_size))  # refuses what several processes cannot share
        if config.allocate == "learned":
            part_of(torch.arange(batch_size))
            check_halves(batch_size)
    stored = checkpoint.tensors[next(iter(traced.values())).stored[0].name]
    return Prepared(
        config=config,
        # a folder by its full path, so that the plan finds it again
        base_model=str(Path(model).resolve()) if Path(model).is_dir() else str(model),
        source=source,
        model_type=str(meta.config.model_type),
        weights_sha256=fingerprint(checkpoint, traced),
        tokenizer=tokenizer,
        windows=windows,
        batch_size=batch_size,
        quantum=quantum,
        bytes_full=checkpoint.bytes,
        bytes_per_parameter=stored.bytes // math.prod(stored.shape),
    )


def rank_channels(model: str | Path, config: CompressConfig, track: Track = silent) -> Ranked:
    """Observe the model on the calibration text, score its channels and put them in order."""
    with TemporaryDirectory() as folder:
        return rank(prepare(model, config), Work(Path(folder) / "ranked", {}), track)


Observed = tuple[PreTrainedModel, Statistics, dict[int, Tensor]]  # and the scores


def _observe_whole(ready: Prepared, ids: Tensor, track: Track) -> Observed:
    config, method = ready.config, find_method(ready.config.method)
    # float32 on the CPU, where it is as fast; the checkpoint's own dtype on an accelerator
    dtype = torch.float32 if pick_device(config.device).type == "cpu" else "auto"
    network = load_stock(ready.source, device="cpu" if config.shard else config.device, dtype=dtype)
    layers = expert_layers(network)
    if config.shard:
        shard_model(network, layers, pick_device(config.device))
    see = observe_shared if ready.windows else observe
    statistics = see(
        network, ids, method.needs, batch_size=ready.batch_size, seed=config.seed, track=track
    )
    score: dict[int, Tensor] = {}
    for layer in layers:
        with gathered(network, layer):  # a method may read the layer's weights
            score |= score_layers(method, [layer], statistics)
    return network, statistics, score


def _observe_by_layer(ready: Prepared, ids: Tensor, work: Work, track: Track) -> Observed:
    """The same within ``config.memory``; the model is on the meta device afterwards."""
    config, method = ready.config, find_method(ready.config.method)
    assert config.memory is not None
    device = pick_device(config.device)
    dtype = torch.float32 if device.type == "cpu" else None
    loader = LayerLoader(ready.source, device, dtype)
    check_weights(loader, config.memory)
    with loader:
        statistics = observe_within(
            loader,
            ids,
            method.needs,
            work,
            config.memory,
            batch_size=ready.batch_size,
            seed=config.seed,
            track=track,
        )
        score: dict[int, Tensor] = {}
        for i, layer in loader.experts.items():
            with loader.resident(i):
                score |= score_layers(method, [layer], statistics)
    return loader.model, statistics, score


def rank(ready: Prepared, work: Work, track: Track = silent) -> Ranked:
    """`rank_channels` for what has been prepared; ``work`` keeps the state."""
    config, source, windows = ready.config, ready.source, ready.windows
    method = find_method(config.method)
    # two tokens show how many experts a token is sent to
    ids = windows.ids if windows else torch.zeros(1, 2, dtype=torch.long)
    if config.memory is not None:
        network, statistics, score = _observe_by_layer(ready, ids, work, track)
    else:
        network, statistics, score = _observe_whole(ready, ids, track)
    layers = expert_layers(network)
    order = {i: order_of(s) for i, s in score.items()}
    for layer in layers:  # without effect where the model is on the meta device
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
            thin_experts=thin_experts(statistics) if method.needs else {},
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

    ``model`` is a folder, a hub id or ``tiny``. Nothing half-written is left when it fails. Of
    several processes (see `training.process_group`) the first one writes.
    """
    config = config or CompressConfig()
    check_config(config)
    check_room(model, out)
    work = Work(out, {"model": str(model), **dataclasses.asdict(config)})
    ranked = rank(prepare(model, config), work, track)
    plan = make_plan(ranked, config.allocate, track, work.stage("learn"))
    by_first(lambda: write_family(ranked.source, plan, out, track))
    work.clear()
    return plan
