"""Recovery: better weights for the same plan. A family stays a family, with all its budgets.

- ``closed-form`` refits the down projections from one forward pass (`refit`), no gradients.
- ``full`` distils the routed experts and their routers, ``router`` the routers alone, ``lora``
  low-rank adapters on the experts, merged at the end (`distil`). The teacher is the same model at
  full width with the original weights: adapters off, or the trained tensors exchanged for the
  ones they began with. No second model is held.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import flexmoe
from flexmoe.around import router_weights
from flexmoe.checkpoint import Checkpoint
from flexmoe.data import (
    calibration_windows,
    check_tokens,
    load_tokenizer,
    pick_batch_size,
    pick_seq_len,
)
from flexmoe.distil import LABELS, Schedule, Swapped, distil, whole
from flexmoe.doctor.sizes import Sizes
from flexmoe.environment import hardware, versions
from flexmoe.errors import FlexmoeError
from flexmoe.evidence import FILE_NAME as EVIDENCE_NAME
from flexmoe.experts import expert_layers
from flexmoe.exporter import copy_others
from flexmoe.family import check_finite, find_folder, load, open_source, pick_device
from flexmoe.files import file_sha256, refuse_existing, refuse_full, remove_stale, written_beside
from flexmoe.lora import lora_experts
from flexmoe.memory import free_memory
from flexmoe.plan import JSON_NAME, Plan, read_manifest
from flexmoe.progress import Track, silent
from flexmoe.recover_config import (
    RANK,
    TOKENS,
    RecoverConfig,
    check_recovery,
    default_rate,
)
from flexmoe.refit import refit
from flexmoe.reports.card import write_card
from flexmoe.reports.provenance import given
from flexmoe.resume import Work
from flexmoe.sharding import shard_model
from flexmoe.shards import Shards, Source, replaced, verify, write
from flexmoe.streamed.layer_loader import LayerLoader
from flexmoe.streamed.refit import refit_within, refitted
from flexmoe.training import by_first, part_of, processes


@dataclass(frozen=True)
class Prepared:
    """All that is known before the slow part: what will be read, done and needed."""

    config: RecoverConfig
    folder: Path
    base: str | Path | None
    plan: Plan
    source: Source
    ids: Tensor
    data_sha256: str
    schedule: Schedule
    trained: int

    @property
    def memory(self) -> int:
        """Bytes on the device beside activations, as `doctor` counts them."""
        model, config = self.source.model, self.config
        total = sum(p.numel() for p in model.parameters())
        sizes = Sizes.of(self.source.checkpoint.tensors, self.source.layers, total)
        if config.mode == "closed-form":
            return sizes.closed_form(free_memory(pick_device(config.device))).memory
        lora = config.mode == "lora"
        trained = sizes.adapters(config.rank or RANK) if lora else self.trained
        return sizes.trained(config.mode, trained).memory


def prepare(family: str | Path, config: RecoverConfig, base: str | Path | None = None) -> Prepared:
    """Check everything that can be checked without the model's weights."""
    check_recovery(config)
    folder = find_folder(family)
    plan = Plan.load(folder)
    plan.check_router_kept("recovery trains members with the router as it is", False)
    _check_members(plan, config)
    source = open_source(folder, plan, base)
    settings = source.model.config
    length = pick_seq_len(config.seq_len, settings)
    size = pick_batch_size(config.batch_size, length)
    tokens = config.tokens or TOKENS[config.mode]
    if tokens < size * length:
        raise FlexmoeError(
            f"{tokens} tokens are less than one batch of {size} windows of {length}: give more "
            "with --tokens, or a smaller --batch-size or --seq-len"
        )
    if config.mode != "closed-form":
        part_of(torch.arange(size))  # refuses what several processes cannot share
    most = min(min(layer.hidden, layer.channels) for layer in plan.layers.values())
    if config.rank is not None and config.rank > most:
        raise FlexmoeError(
            f"rank {config.rank} is more than an expert's matrices can have, {most}: lower --rank"
        )
    steps = tokens // (size * length)
    windows = calibration_windows(
        config.data,
        load_tokenizer(source.checkpoint.path, settings),
        samples=steps * size,
        seq_len=length,
        seed=config.seed + 1,  # not the windows that the plan was calibrated on
        fewer=True,
    )
    ids = check_tokens(windows.ids, settings)
    schedule = Schedule(
        steps=steps,
        batch_size=size,
        micro_batch=config.micro_batch or size,
        lr=config.lr or default_rate(config.mode, next(iter(plan.layers.values())).hidden),
        seed=config.seed,
    )
    trained = sum(p.numel() for p in trained_parameters(source.model, config.mode).values())
    return Prepared(config, folder, base, plan, source, ids, windows.sha256, schedule, trained)


def _check_members(plan: Plan, config: RecoverConfig) -> None:
    """`FlexmoeError` unless the plan has the members that the scheme trains."""
    if config.mode == "closed-form":
        return
    if config.picked_scheme == "sp":
        try:
            plan.widths(config.picked_at)
        except FlexmoeError as error:
            hint = (
                ""
                if config.at is not None
                else ". Scheme 'sp' trains that one by default: give --at"
            )
            raise FlexmoeError(f"{error}{hint}") from None
    elif plan.recipe.unit == "expert":
        raise FlexmoeError(
            f"scheme '{config.picked_scheme}' trains members between the budgets, and this plan "
            "removes whole experts and knows those of its budgets only: give one of them with "
            f"--at ({', '.join(f'{share:g}' for share in plan.budgets[1:])}), or --mode closed-form"
        )


def trained_parameters(model: nn.Module, mode: str) -> dict[str, nn.Parameter]:
    """What a mode changes, by name: the down projections, the routers, or both and all of the
    experts' channels. (LoRA is merged into the experts.)"""
    layers = expert_layers(model)
    found: dict[str, nn.Parameter] = {}
    for layer in layers:
        for name, parameter in layer.parameters.items():
            if mode in ("full", "lora") or (mode == "closed-form" and name == "down_proj"):
                found[f"{layer.name}.{name}"] = parameter
    if mode in ("full", "router"):
        routers = {name: p for layer in layers for name, p in router_weights(layer).items()}
        found |= routers
        if mode == "router" and not routers:
            raise FlexmoeError(
                f"no router weights found beside the experts of {type(model).__name__}: use mode "
                "'lora' or 'full'"
            )
    return found


def recover(
    family: str | Path,
    out: str | Path,
    config: RecoverConfig | None = None,
    *,
    base: str | Path | None = None,
    announce: Callable[[Prepared], None] = lambda ready: None,
    track: Track = silent,
) -> dict[str, Any]:
    """Write the family ``out``: the plan of ``family`` (or of a plan alone, on ``base``) with
    recovered weights. Returns the record of the recovery that its manifest keeps.

    A run that was killed goes on from its last state when it is started again with the same
    settings; nothing half-written is left. ``announce`` is told what will be done and needed
    before the model is loaded.
    """
    config = config or RecoverConfig()
    work = Work(out, {"family": str(family), "base": str(base), **asdict(config)})
    made = Path(out).expanduser()
    if work.begun and (made / JSON_NAME).is_file():  # killed when all was done
        by_first(work.clear)
        return read_manifest(made).recipe.recovery[-1]
    refuse_existing(out)
    remove_stale(out)
    ready = prepare(family, config, base)
    refuse_full(out, ready.source.checkpoint.bytes, "the family")
    announce(ready)
    plan_sha256 = file_sha256(ready.folder / JSON_NAME)
    inputs = {"data_sha256": ready.data_sha256, "version": flexmoe.__version__}
    recovered = _recovered if config.memory is None else _recovered_by_layer
    with work.on(plan_sha256=plan_sha256, **inputs):
        shards, record = recovered(ready, work, track)
    with work.writing():
        by_first(lambda: _write(ready, shards(), record, out, track))
    work.clear()
    return record


Recovered = tuple[Callable[[], Shards], dict[str, Any]]


def _recovered(ready: Prepared, work: Work, track: Track) -> Recovered:
    """The shards to write (for the first of several processes, which has all weights), and the
    record of how they came about."""
    config = ready.config
    device = "cpu" if config.shard else config.device
    model = load(ready.folder, base=ready.base, device=device, dtype=torch.float32)
    check_finite(model)
    if config.shard:
        shard_model(model, expert_layers(model), pick_device(config.device))
    record = _record(ready, model.device) | train(model, ready, work, track)
    # the experts in any case: those of a plan alone are stored in another order
    names = trained_parameters(ready.source.model, "lora")
    names |= trained_parameters(ready.source.model, config.mode)
    new = {}
    for name, parameter in model.named_parameters():
        if name in names:
            full = whole(parameter.detach())  # of sharded ones all processes must ask together
            if processes()[0] == 0:
                new[name] = full
    return lambda: replaced(ready.source, new), record


def _recovered_by_layer(ready: Prepared, work: Work, track: Track) -> Recovered:
    """The same within ``config.memory``."""
    config, device, start = ready.config, pick_device(ready.config.device), time.monotonic()
    assert config.memory is not None
    ranked = read_manifest(ready.folder).ranked
    with LayerLoader(ready.source.checkpoint.path, device, torch.float32) as loader:
        folder = refit_within(
            config.memory,
            loader,
            ready.plan,
            ready.ids,
            ranked=ranked,
            batch_size=ready.schedule.batch_size,
            saved=work.stage("layers"),
            track=track,
        )
    record = _record(ready, device) | {"seconds": round(time.monotonic() - start, 1)}
    return lambda: refitted(ready.source, ready.plan, ranked, folder), record


def _record(ready: Prepared, device: torch.device) -> dict[str, Any]:
    """What the manifest keeps of any recovery."""
    config = ready.config
    return {
        **{
            name: value
            for name, value in asdict(config).items()
            if value is not None and value is not False
        },
        "data_sha256": ready.data_sha256,
        "windows": len(ready.ids),
        "options": given(config),
        "hardware": hardware(device),
        **versions(),
    }


def _write(
    ready: Prepared, shards: Shards, record: dict[str, Any], out: str | Path, track: Track
) -> None:
    recipe = ready.plan.recipe
    recipe = recipe.model_copy(update={"recovery": [*recipe.recovery, record]})
    plan = replace(ready.plan, recipe=recipe)
    with written_beside(out) as partial:
        copy_others(ready.source.checkpoint, partial)
        write(partial, shards, track)
        verify(Checkpoint(partial), shards, track)
        plan.save(partial, ranked=True)
        if (kept := ready.folder / EVIDENCE_NAME).is_file():  # of the same plan
            shutil.copyfile(kept, partial / EVIDENCE_NAME)
        write_card(partial, track=track)


def train(
    model: PreTrainedModel, ready: Prepared, work: Work, track: Track = silent
) -> dict[str, Any]:
    """Improve the weights of ``model`` in place; returns figures for the record."""
    config, schedule = ready.config, ready.schedule
    if config.mode == "closed-form":
        report = refit(model, ready.plan, ready.ids, batch_size=schedule.batch_size, track=track)
        return {"seconds": round(report.seconds, 1)}
    scheme, at = config.picked_scheme, config.picked_at
    options: dict[str, Any] = {
        "scheme": scheme,
        "at": at,
        "labels": LABELS if config.labels is None else config.labels,
        "checkpointing": config.checkpointing,
        "autocast": torch.bfloat16 if pick_device(config.device).type == "cuda" else None,
        "saved": work.stage("recover"),
        "track": track,
    }
    if config.mode == "lora":
        with lora_experts(model, rank=config.rank or RANK, seed=config.seed) as adapter:
            if scheme == "sp":
                adapter.only_first(ready.plan.widths(at))
            distil(model, adapter.parameters, adapter.off, ready.ids, schedule, **options)
    else:
        named = dict(model.named_parameters())
        names = trained_parameters(ready.source.model, config.mode)
        parameters = [named[name] for name in names]
        swapped = Swapped(parameters)
        distil(model, parameters, swapped.original, ready.ids, schedule, **options)
    tokens = schedule.steps * schedule.batch_size * ready.ids.shape[1]
    done = {"steps": schedule.steps, "tokens_trained": tokens, "lr": schedule.lr, "scheme": scheme}
    return done | ({"labels": options["labels"]} if scheme == "family" else {})
