"""The main job: a MoE checkpoint becomes a family. Observe, rank, allocate or learn, write."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version

import flexmoe
from flexmoe.actions import ActionConfig, learn_widths
from flexmoe.allocate import (
    allocate,
    allocate_experts,
    default_quantum,
    order_of,
    widths_from_path,
)
from flexmoe.checkpoint import Checkpoint, meta_model, resolve
from flexmoe.data import (
    Windows,
    calibration_windows,
    check_tokens,
    load_tokenizer,
    pick_batch_size,
    pick_seq_len,
)
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import expert_layers
from flexmoe.exporter import check_room, write_family
from flexmoe.family import attach, load_stock, pick_device
from flexmoe.learn import LearnConfig, check_halves, learn_positions
from flexmoe.methods import find_method, score_layers
from flexmoe.plan import LayerRecord, Plan, Recipe
from flexmoe.progress import Track, silent
from flexmoe.reference import add_reference, check_reference
from flexmoe.resume import Saved, Work
from flexmoe.sequential import check_sequential, score_sequential
from flexmoe.sharding import check_processes, gathered, shard_model
from flexmoe.statistics import find_statistics, observe, observe_shared, thin_experts
from flexmoe.trace import fingerprint, trace
from flexmoe.training import by_first, part_of, share

SAMPLES = 128  # windows of calibration text
ALLOCATORS = ("uniform", "layer", "global", "learned", "actions")
# the allocators that learn
SETTINGS_OF: dict[str, type[LearnConfig] | type[ActionConfig]] = {
    "learned": LearnConfig,
    "actions": ActionConfig,
}
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class CompressConfig:
    """What `compress` can be told. None means the default that fits the model; the defaults are
    those that measured best on held-out text (docs/log.md). ``allocate`` None is the method's own.
    ``reference``: a second checkpoint, for methods that compare with one. ``sequential``: score
    every layer with those before it pruned at this share.
    ``shard`` splits the model over all processes, see `sharding`."""

    data: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    pruned: tuple[float, ...] = BUDGETS
    method: str = "fisher"
    allocate: str | None = None
    reference: str | None = None
    sequential: float | None = None
    quantum: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    checkpointing: bool = False
    learn: LearnConfig | ActionConfig | None = None
    seed: int = 0
    device: str = "auto"
    shard: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read at all."""
        return find_method(self.method).needs_data or self.allocator in SETTINGS_OF

    @property
    def allocator(self) -> str:
        """What ``allocate`` says, or else the method's own."""
        return self.allocate or find_method(self.method).allocate


@dataclass
class Ranked:
    """A model in memory with its channels in order, and what is known of them.

    ``score`` and ``order`` [E, I] of every layer describe the channels as they stand in ``model``:
    ``order`` is their original index. ``bytes_full``
    counts the checkpoint's tensors, ``bytes_per_parameter`` those of the experts.
    """

    config: CompressConfig
    source: Path
    model: PreTrainedModel
    tokenizer: Any
    windows: Windows | None
    batch_size: int
    quantum: int
    layers: dict[int, LayerRecord]
    score: dict[int, Tensor]
    order: dict[int, Tensor]
    bytes_full: int
    bytes_per_parameter: int
    recipe: Recipe


def check_config(config: CompressConfig) -> None:
    """Refuse what cannot work, or would have no effect, before anything slow starts."""
    if config.allocator not in ALLOCATORS:
        raise did_you_mean(config.allocator, ALLOCATORS, "allocator")
    check_reference([find_method(config.method)], config.reference)
    if config.sequential is not None:
        check_sequential(find_method(config.method), config.sequential)
    if find_method(config.method).unit == "expert":
        if config.allocator not in ("layer", "global"):
            raise FlexmoeError(
                f"method '{config.method}' scores whole experts, allocate '{config.allocator}' is "
                "of channels: use layer (the same number in every layer) or global"
            )
        if config.quantum is not None:
            raise FlexmoeError(
                f"quantum has no effect: method '{config.method}' removes whole experts"
            )
    if not config.pruned or not all(0 < share < 1 for share in config.pruned):
        raise FlexmoeError(
            f"pruned shares must lie between 0 and 1, found {list(config.pruned)}: "
            "0.4 means 40 % of the routed-expert parameters removed"
        )
    if config.quantum is not None and config.quantum < 1:
        raise FlexmoeError(f"quantum must be at least 1 channel, found {config.quantum}")
    pick_batch_size(config.batch_size, 1)
    unread = ("data", "samples", "seq_len", "batch_size")
    asked = [name for name in unread if getattr(config, name) is not None]
    if asked and not config.needs_data:
        raise FlexmoeError(
            f"{', '.join(asked)} without effect: method '{config.method}' with allocate "
            f"'{config.allocator}' looks at the weights only"
        )
    wanted = SETTINGS_OF.get(config.allocator)
    if config.learn is not None and not (wanted and isinstance(config.learn, wanted)):
        raise FlexmoeError(
            f"settings of learning have no effect with allocate '{config.allocator}': use 'learned'"
        )
    for name in ("micro_batch", "checkpointing"):
        if getattr(config, name) and config.allocator != "learned":
            raise FlexmoeError(f"{name} has an effect with allocate 'learned' only")
    if config.micro_batch is not None and config.micro_batch < 1:
        raise FlexmoeError(f"micro-batch must be at least 1 window, found {config.micro_batch}")
    if config.shard:
        if config.allocator == "actions":
            raise FlexmoeError("shard does not work with allocate 'actions': use 'learned'")
        needs = find_statistics(find_method(config.method).needs)
        if any(statistic.when == "weights" for statistic in needs):
            raise FlexmoeError(
                f"shard does not work with method '{config.method}', which looks at the gradients "
                "of whole weights: use 'fisher' or 'heapr'"
            )
        check_processes()
    pick_device(config.device)


def rank_channels(model: str | Path, config: CompressConfig, track: Track = silent) -> Ranked:
    """Observe the model on the calibration text, score its channels and put them in order."""
    check_config(config)
    method = find_method(config.method)
    source = resolve(model)
    meta, checkpoint = meta_model(source), Checkpoint(source)
    traced = trace(checkpoint, meta)  # refuses weights it cannot find before the slow part
    channels = [layer.shape.channels for layer in expert_layers(meta)]
    narrowest = min(channels)
    quantum = default_quantum(narrowest) if config.quantum is None else config.quantum
    if method.unit == "expert":  # all or nothing
        quantum = max(channels)
    elif quantum > narrowest:
        raise FlexmoeError(f"quantum {quantum} is wider than an expert of {narrowest} channels")
    tokenizer, windows = None, None
    ids = torch.zeros(1, 2, dtype=torch.long)  # shows how many experts a token is sent to
    if config.needs_data:
        tokenizer = load_tokenizer(source, meta.config)
        windows = calibration_windows(
            config.data or "tiny",
            tokenizer,
            samples=SAMPLES if config.samples is None else config.samples,
            seq_len=pick_seq_len(config.seq_len, meta.config),
            seed=config.seed,
        )
        ids = check_tokens(windows.ids, meta.config)
    batch_size = pick_batch_size(config.batch_size, ids.shape[1])
    settings: dict[str, float | int | str] = {"batch_size": batch_size}
    if config.reference is not None:
        settings["reference"] = config.reference
    if config.sequential is not None:
        settings["sequential"] = config.sequential
    if windows:  # refuse what several processes cannot share before the slow part
        share(ids.split(batch_size))
        if config.allocator == "learned":
            part_of(torch.arange(batch_size))
            check_halves(batch_size)
    # float32 on the CPU, where it is as fast; the checkpoint's own dtype on an accelerator
    dtype = torch.float32 if pick_device(config.device).type == "cpu" else "auto"
    network = load_stock(source, device="cpu" if config.shard else config.device, dtype=dtype)
    layers = expert_layers(network)
    if config.shard:
        shard_model(network, layers, pick_device(config.device))
    how: dict[str, Any] = {"batch_size": batch_size, "seed": config.seed, "track": track}
    score: dict[int, Tensor] = {}
    if config.sequential is not None:
        score, statistics = score_sequential(network, ids, method, config.sequential, **how)
    else:
        see = observe_shared if windows else observe
        statistics = see(network, ids, method.needs, **how)
    if config.reference is not None:
        add_reference(statistics, layers, config.reference)
    for layer in layers if not score else ():
        with gathered(network, layer):  # a method may read the layer's weights
            score |= score_layers(method, [layer], statistics)
    for layer in layers if method.unit == "expert" else ():  # its channels share its fate
        score[layer.index] = score[layer.index][:, None].expand(-1, layer.I)
    order = {i: order_of(s) for i, s in score.items()}
    for layer in layers:
        layer.permute_(order[layer.index])
    records = {
        layer.index: LayerRecord(
            **vars(layer.shape), experts_per_token=statistics[layer.index].experts_per_token
        )
        for layer in layers
    }
    stored = checkpoint.tensors[next(iter(traced.values())).stored[0].name]
    return Ranked(
        config=config,
        source=source,
        model=network,
        tokenizer=tokenizer,
        windows=windows,
        batch_size=batch_size,
        quantum=quantum,
        layers=records,
        score={i: s.gather(1, order[i].long()) for i, s in score.items()},
        order=order,
        bytes_full=checkpoint.bytes,
        bytes_per_parameter=stored.bytes // math.prod(stored.shape),
        recipe=Recipe(
            # a folder by its full path, so that the plan finds it again
            base_model=str(Path(model).resolve()) if Path(model).is_dir() else str(model),
            model_type=str(network.config.model_type),
            revision=source.name if source.parent.name == "snapshots" else None,
            weights_sha256=fingerprint(checkpoint, traced),
            method=config.method,
            allocate=config.allocator,
            unit=method.unit,
            settings=settings,
            data=windows.spec if windows else "",
            data_sha256=windows.sha256 if windows else "",
            samples=len(windows.ids) if windows else 0,
            seq_len=windows.ids.shape[1] if windows else 0,
            seed=config.seed,
            thin_experts=thin_experts(statistics) if method.needs_data else {},
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
    elif ranked.recipe.unit == "expert":
        width = allocate_experts(allocator, shapes, {i: s[:, 0] for i, s in score.items()}, budgets)
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
    ranked = rank_channels(model, config, track)
    plan = make_plan(ranked, config.allocator, track, work.stage("learn"))
    by_first(lambda: write_family(ranked.source, plan, out, track))
    work.clear()
    return plan


def budget_list(text: str) -> tuple[float, ...]:
    """``0.1,0.2`` as shares; a `FlexmoeError` if there is none or one is no number."""
    try:
        shares = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        shares = ()
    if not shares:
        raise FlexmoeError(
            f"'{text}' is no list of pruned shares: write 0.4 or 0.1,0.2,0.4 (40 % is 0.4)"
        )
    return shares
