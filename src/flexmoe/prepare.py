"""What is known of a compression before any weight is loaded: the checks, and the text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import flexmoe
from flexmoe.allocate import allocate_experts
from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.config import SAMPLES, CompressConfig, check_config
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
from flexmoe.headers import resolve
from flexmoe.learn import check_halves
from flexmoe.methods import find_method
from flexmoe.routing.counts import builder, find_counts
from flexmoe.routing.rules import kept_experts
from flexmoe.trace import fingerprint, trace
from flexmoe.training import part_of, share
from flexmoe.widths import default_quantum


@dataclass(kw_only=True)
class Prepared:
    """All that is known before the weights are loaded.

    ``weights_sha256`` is their `trace.fingerprint`; ``bytes_full`` counts the checkpoint's
    tensors, ``bytes_per_parameter`` those of the experts; ``router_groups`` see `Recipe`.
    ``windows`` and ``tokenizer`` are None where no text is read.
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
    router_groups: int = 1

    @property
    def inputs(self) -> dict[str, str]:
        """What the result depends on beside the command: hashes of what that names, our version."""
        inputs = {"weights_sha256": self.weights_sha256, "version": flexmoe.__version__}
        if self.windows:
            inputs["data_sha256"] = self.windows.sha256
        if sha256 := find_method(self.config.method).sha256:
            inputs["method_sha256"] = sha256
        return inputs


def pick_quantum(config: CompressConfig, channels: list[int]) -> int:
    """What widths are multiples of, for layers whose experts have so many ``channels``."""
    narrowest = min(channels)
    if find_method(config.method).unit == "expert":  # all or nothing
        return max(channels)
    quantum = default_quantum(narrowest) if config.quantum is None else config.quantum
    if quantum > narrowest:
        raise FlexmoeError(f"quantum {quantum} is wider than an expert of {narrowest} channels")
    return quantum


def router_groups(meta: PreTrainedModel, config: CompressConfig) -> int:
    """From how many groups experts must go in equal numbers; `FlexmoeError` if they cannot, or if
    too few would be left at the poorest budget."""
    if config.router != "remove":
        return 1
    counts = find_counts(meta.config.to_dict(), builder(meta))
    check_groups(counts.groups, config.allocator, config.sequential)
    shapes = {layer.index: layer.shape for layer in expert_layers(meta)}
    alike = {i: torch.zeros(shape.experts) for i, shape in shapes.items()}
    name = "layer" if config.allocator == "layer" else "global"
    K = dict.fromkeys(shapes, counts.K)
    width = allocate_experts(name, shapes, alike, (max(config.pruned),), counts.groups, K)
    kept = {len(kept_experts(counts, width_BE[0] == 0, i)) for i, width_BE in width.items()}
    if min(kept) < counts.K:
        counts.model(min(kept))  # refuses a router that cannot choose fewer
    return counts.groups


def check_groups(groups: int, allocator: str, sequential: float | None = None) -> None:
    """`FlexmoeError` unless all ``groups`` of experts that a router chooses within lose equally
    many when it forgets them."""
    said = f"this router chooses within {groups} groups of experts, which must stay equally large"
    if groups > 1 and allocator != "layer":
        raise FlexmoeError(f"{said}: with --router remove use --allocate layer")
    if groups > 1 and sequential is not None:
        raise FlexmoeError(f"{said}: with --router remove leave out --sequential")


def prepare(model: str | Path, config: CompressConfig) -> Prepared:
    """Check and read all that can be without the model's weights."""
    check_config(config)
    source = resolve(model)
    if config.reference is not None:
        Checkpoint(resolve(config.reference))  # refuses what is not there before the slow part
    meta, checkpoint = meta_model(source), Checkpoint(source)
    traced = trace(checkpoint, meta)  # refuses weights it cannot find before the slow part
    quantum = pick_quantum(config, [layer.shape.channels for layer in expert_layers(meta)])
    tokenizer, windows, batch_size = None, None, 1
    if config.needs_data:
        tokenizer = load_tokenizer(source, meta.config)
        windows = calibration_windows(
            "tiny" if config.data is None else config.data,
            tokenizer,
            samples=SAMPLES if config.samples is None else config.samples,
            seq_len=pick_seq_len(config.seq_len, meta.config),
            seed=config.seed,
        )
        check_tokens(windows.ids, meta.config)
        batch_size = pick_batch_size(config.batch_size, windows.ids.shape[1])
        share(windows.batches(batch_size))  # refuses what several processes cannot share
        if config.allocator == "learned":
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
        router_groups=router_groups(meta, config),
    )
