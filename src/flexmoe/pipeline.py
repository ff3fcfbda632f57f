"""The main job: a MoE checkpoint becomes a family. Observe, rank, allocate or learn, write."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel
from transformers import __version__ as transformers_version

import flexmoe
from flexmoe.allocate import allocate, default_quantum, order_of, widths_from_path
from flexmoe.checkpoint import Checkpoint, meta_model, resolve
from flexmoe.data import Windows, calibration_windows, default_seq_len
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.experts import expert_layers
from flexmoe.exporter import rank_checkpoint
from flexmoe.family import load_stock, pick_device
from flexmoe.files import refuse_existing, written_beside
from flexmoe.learn import LearnConfig, learn_widths
from flexmoe.methods import find_method, score_layers
from flexmoe.plan import LayerRecord, Plan, Recipe
from flexmoe.progress import Track, silent
from flexmoe.statistics import Statistics, observe
from flexmoe.trace import trace

ALLOCATORS = ("uniform", "layer", "global", "learned")
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)


@dataclass(frozen=True)
class CompressConfig:
    """What `compress` can be told. None means the default that fits the model; the defaults are
    those that measured best on held-out text (docs/log.md)."""

    data: str | None = None
    samples: int = 128
    seq_len: int | None = None
    pruned: tuple[float, ...] = BUDGETS
    method: str = "fisher"
    allocate: str = "global"
    quantum: int | None = None
    batch_size: int = 8
    learn: LearnConfig = field(default_factory=LearnConfig)
    seed: int = 0
    device: str = "auto"


@dataclass
class Ranked:
    """A model in memory with its channels in order, and what is known of them.

    ``score`` [E, I] and ``order`` [E, I] of every layer; ``score`` is in the order already.
    ``bytes_full`` counts the checkpoint's tensors, ``bytes_per_parameter`` those of the experts.
    """

    config: CompressConfig
    source: Path
    name: str
    model: PreTrainedModel
    tokenizer: Any
    layers: dict[int, LayerRecord]
    score: dict[int, Tensor]
    order: dict[int, Tensor]
    statistics: Statistics
    windows: Windows | None
    bytes_full: int
    bytes_per_parameter: int


def check_config(config: CompressConfig) -> None:
    """Refuse what cannot work, or would have no effect, before anything slow starts."""
    if config.allocate not in ALLOCATORS:
        raise did_you_mean(config.allocate, ALLOCATORS, "allocator")
    if not config.pruned or not all(0 < share < 1 for share in config.pruned):
        raise FlexmoeError(
            f"pruned shares must lie between 0 and 1, found {list(config.pruned)}: "
            "0.4 means 40 % of the routed-expert parameters removed"
        )
    for name, value in (("samples", config.samples), ("batch size", config.batch_size)):
        if value < 1:
            raise FlexmoeError(f"{name} must be at least 1, found {value}")
    if config.seq_len is not None and config.seq_len < 2:
        raise FlexmoeError(f"seq_len must be at least 2 tokens, found {config.seq_len}")
    needs_data = find_method(config.method).needs or config.allocate == "learned"
    if config.data is not None and not needs_data:
        raise FlexmoeError(
            f"--data has no effect: method '{config.method}' with allocate '{config.allocate}' "
            "looks at the weights only; leave it out"
        )
    if config.allocate != "learned" and config.learn != LearnConfig():
        raise FlexmoeError("settings of learning have no effect without --allocate learned")
    pick_device(config.device)


def rank_channels(model: str | Path, config: CompressConfig, track: Track = silent) -> Ranked:
    """Observe the model on the calibration text, score its channels and put them in order."""
    check_config(config)
    method = find_method(config.method)
    source = resolve(model)
    meta, checkpoint = meta_model(source), Checkpoint(source)
    pieces = trace(checkpoint, meta)  # refuses weights it cannot find before the slow part
    stored = checkpoint.tensors[next(iter(pieces.values())).stored[0].name]
    shapes = {layer.index: layer.shape for layer in expert_layers(meta)}
    quantum = config.quantum or default_quantum(min(s.channels for s in shapes.values()))
    if quantum > min(s.channels for s in shapes.values()):
        raise FlexmoeError(f"quantum {quantum} is wider than an expert of the model")
    config = replace(config, quantum=quantum)
    tokenizer, windows = None, None
    if method.needs or config.allocate == "learned":
        tokenizer = AutoTokenizer.from_pretrained(source)
        windows = calibration_windows(
            config.data or "tiny",
            tokenizer,
            samples=config.samples,
            seq_len=config.seq_len or default_seq_len(meta.config),
            seed=config.seed,
        )
    device = pick_device(config.device)
    # float32 on the CPU, where it is as fast; the checkpoint's own dtype on an accelerator
    dtype: torch.dtype | str = torch.float32 if device.type == "cpu" else "auto"
    network = load_stock(source, device=config.device, dtype=dtype)
    ids = windows.ids if windows is not None else torch.zeros(1, 2, dtype=torch.long)
    statistics = observe(
        network, ids, method.needs, batch_size=config.batch_size, seed=config.seed, track=track
    )
    layers = expert_layers(network)
    score = score_layers(method, layers, statistics)
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
        config=config,
        source=source,
        name=str(model),
        model=network,
        tokenizer=tokenizer,
        layers=records,
        score={i: s.gather(1, order[i].long()) for i, s in score.items()},
        order=order,
        statistics=statistics,
        windows=windows,
        bytes_full=checkpoint.bytes,
        bytes_per_parameter=stored.bytes // math.prod(stored.shape),
    )


def make_plan(ranked: Ranked, allocator: str, track: Track = silent) -> Plan:
    """Widths for all budgets by one allocator; ``learned`` trains on the calibration windows."""
    config = ranked.config
    assert config.quantum is not None
    shapes = {i: record.shape for i, record in ranked.layers.items()}
    budgets = (0.0, *sorted(set(config.pruned)))
    settings: dict[str, float | int | str] = {"batch_size": config.batch_size}
    if allocator == "learned":
        assert ranked.windows is not None
        learn = replace(config.learn, seed=config.seed)
        path = learn_widths(ranked.model, ranked.windows.ids, learn, track)
        width = widths_from_path(shapes, ranked.score, path, budgets, config.quantum)
        settings |= {f"learn_{k}": v for k, v in vars(learn).items() if isinstance(v, int | float)}
        settings["learn_actions"] = " ".join(map(str, learn.actions))
    else:
        width = allocate(allocator, shapes, ranked.score, budgets, config.quantum)
    windows = ranked.windows
    return Plan(
        layers=ranked.layers,
        order=ranked.order,
        width=width,
        budgets=budgets,
        quantum=config.quantum,
        recipe=Recipe(
            base_model=_portable(ranked.name),
            model_type=str(ranked.model.config.model_type),
            method=config.method,
            allocate=allocator,
            settings=settings,
            data=windows.spec if windows else "",
            data_sha256=windows.sha256 if windows else "",
            samples=len(windows.ids) if windows else 0,
            seq_len=windows.ids.shape[1] if windows else 0,
            seed=config.seed,
            versions={
                "flexmoe": flexmoe.__version__,
                "torch": torch.__version__,
                "transformers": transformers_version,
            },
        ),
        bytes_full=ranked.bytes_full,
        bytes_per_parameter=ranked.bytes_per_parameter,
    )


def _portable(name: str) -> str:
    """A hub id or ``tiny`` as it is; a folder by its full path, so that the plan finds it again."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def write_family(ranked: Ranked, plan: Plan, out: str | Path, track: Track = silent) -> Path:
    """The ranked checkpoint with the plan beside it, compared with the source before it counts."""
    with written_beside(out) as partial:
        rank_checkpoint(ranked.source, plan, partial, track)
        plan.save(partial, ranked=True)
    return Path(out)


def compress(
    model: str | Path,
    out: str | Path,
    config: CompressConfig | None = None,
    *,
    track: Track = silent,
) -> Plan:
    """Turn a MoE checkpoint into a family folder ``out``; returns its plan.

    ``model`` is a folder, a hub id or ``tiny``. Nothing is left behind when it fails.
    """
    config = config or CompressConfig()
    refuse_existing(out)
    ranked = rank_channels(model, config, track)
    plan = make_plan(ranked, config.allocate, track)
    write_family(ranked, plan, out, track)
    return plan


def budget_list(text: str) -> tuple[float, ...]:
    """``0.1,0.2`` as shares; a `FlexmoeError` names what is not one."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise FlexmoeError(
            f"'{text}' is no list of pruned shares: write 0.4 or 0.1,0.2,0.4 (40 % is 0.4)"
        ) from None
