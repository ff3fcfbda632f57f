"""What a checkpoint is, what can be done with it, what that takes, and every reason it would fail.

Reads configs and shard headers only; what shapes can tell is asked of a model without weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from flexmoe.checkpoint import Checkpoint, meta_model, read_config
from flexmoe.config import CompressConfig, check_config
from flexmoe.data import load_tokenizer, pick_batch_size, pick_seq_len
from flexmoe.doctor.estimates import Estimator
from flexmoe.doctor.found import Diagnosis, Layer, widths
from flexmoe.doctor.glance import open_headers
from flexmoe.doctor.room import note_what_does_not_fit
from flexmoe.doctor.sizes import EXPORTED
from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers, routed_parameters
from flexmoe.family import pick_device
from flexmoe.files import free_disk, refuse_existing
from flexmoe.headers import local_folder, resolve
from flexmoe.learn import check_halves
from flexmoe.memory import free_memory
from flexmoe.methods import find_method
from flexmoe.names import missing_parameters
from flexmoe.plan import JSON_NAME, Plan
from flexmoe.recover_config import MODES, RecoverConfig
from flexmoe.trace import trace
from flexmoe.uniform import uniform_config
from flexmoe.widths import LAYOUTS


def examine(
    model: str | Path,
    config: CompressConfig | None = None,
    out: str | Path | None = None,
    *,
    everything: bool = True,
    described: Callable[[Diagnosis], None] = lambda found: None,
) -> Diagnosis:
    """Examine a checkpoint, or a family, for `compress` with ``config`` into ``out``; with
    ``everything`` also for recovery and exports. ``described`` is told as soon as it is known what
    the checkpoint is: what jobs need takes longer to find out. What `glance` tells before that,
    this finds again, from transformers' own classes."""
    found, wanted = Diagnosis(str(model)), config or CompressConfig()
    found.attempt(lambda: check_config(wanted))
    device = found.attempt(lambda: pick_device(wanted.device))
    config = CompressConfig() if found.problems else wanted  # those refused have no needs
    folder = found.attempt(lambda: local_folder(model))
    if folder is None:
        return found
    settings = found.attempt(lambda: read_config(folder))
    if settings is None:
        return found
    network = found.attempt(lambda: meta_model(folder))
    if network is None and settings.get("quantization_config"):  # what else would be wrong?
        plain = {k: v for k, v in settings.items() if k != "quantization_config"}
        network = found.attempt(lambda: meta_model(folder, plain))
    checkpoint = found.attempt(lambda: resolve(folder)) and open_headers(Checkpoint, folder, found)
    if network is None:
        return found
    found.model_type = str(network.config.model_type)
    found.architecture = type(network).__name__
    layers = found.attempt(lambda: expert_layers(network))
    if config.needs_data:
        found.attempt(lambda: load_tokenizer(folder, network.config))
        length = found.attempt(lambda: pick_seq_len(config.seq_len, network.config))
        if length and config.allocator == "learned":
            found.attempt(lambda: check_halves(pick_batch_size(config.batch_size, length)))
    if layers is None:
        return found
    _describe(found, network, layers, config)
    traced = checkpoint and found.attempt(lambda: trace(checkpoint, network))
    if checkpoint and traced:
        found.attempt(lambda: missing_parameters(checkpoint, network))
    if checkpoint and traced and (everything or not found.problems):
        estimator = Estimator(checkpoint, traced, device or torch.device("cpu"))
        if _runs(found, estimator, config):
            size = _exports(found, estimator) if everything else {}
            described(found)
            _estimate(found, estimator, config, out, size)
    return found


def before_compress(model: str | Path, out: str | Path, config: CompressConfig) -> list[str]:
    """What `compress` should tell its user before it starts. Raises `FlexmoeError` with every
    reason why it would fail."""
    check_config(config)
    refuse_existing(out)
    found = examine(resolve(model), config, out, everything=False)
    if len(found.problems) > 1:
        raise FlexmoeError("\n- ".join([f"{model} cannot be compressed:", *found.problems]))
    if found.problems:
        raise FlexmoeError(found.problems[0])
    return found.warnings


def _describe(
    found: Diagnosis, network: PreTrainedModel, layers: list[ExpertLayer], config: CompressConfig
) -> None:
    parameters = dict(network.named_parameters())
    for layer in layers:
        shared = sum(p.numel() for name, p in parameters.items() if is_shared(name, layer))
        found.layers.append(
            Layer(
                layer.index,
                layer.E,
                layer.I,
                layer.H,
                activation_name(layer),
                layer.flags,
                shared,
            )
        )
    total, routed = sum(p.numel() for p in parameters.values()), routed_parameters(network)
    shared = sum(layer.shared_parameters for layer in found.layers)
    found.parameters = {"total": total, "routed": routed, "shared": shared}
    narrowest = min(layer.I for layer in layers)
    if config.quantum is not None and config.quantum > narrowest:
        found.problems.append(
            f"quantum {config.quantum} is wider than an expert of {narrowest} channels"
        )
    found.widths = widths(narrowest, config.quantum)


def activation_name(layer: ExpertLayer) -> str:
    """The class of the experts' activation function, where they have one."""
    function = getattr(layer.module, "act_fn", None)
    return "its own" if function is None else type(function).__name__


def is_shared(name: str, layer: ExpertLayer) -> bool:
    """Whether a parameter is of shared experts in the decoder layer of ``layer``."""
    block = layer.name.rpartition(".")[0].rpartition(".")[0]
    return name.startswith(f"{block}.") and bool(re.search(r"\bshared_|_shared\b|\.shared", name))


def _runs(found: Diagnosis, estimator: Estimator, config: CompressConfig) -> bool:
    """Whether the model runs at all, on how many experts a token, and whether the method fits."""
    found.device, found.dtype = str(estimator.device), str(estimator.stored).removeprefix("torch.")
    try:
        top_k = estimator.top_k
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        found.problems.append(
            f"the model of this config.json cannot run ({line}): compare the file with that of "
            "the original checkpoint (as many experts a token as there are experts, at most?)"
        )
        return False
    found.experts_per_token = top_k
    found.attempt(lambda: estimator.try_method(find_method(config.method)))
    if top_k:
        idle = sum(
            t.layer.shape.parameters * (1 - top_k / t.layer.E) for t in estimator.traced.values()
        )
        found.parameters["active"] = round(found.parameters["total"] - idle)
    return True


def _estimate(
    found: Diagnosis,
    estimator: Estimator,
    config: CompressConfig,
    out: str | Path | None,
    exported: dict[str, int],
) -> None:
    """The needs of compress and, if there are exports (bytes by layout), of them and recovery."""
    found.memory_free = free_memory(estimator.device)
    found.disk_free = free_disk(out or ".")
    found.needs.append(estimator.compress(config))
    for mode in MODES if exported else ():
        recover = RecoverConfig(mode=mode, device=config.device)
        need = found.attempt(partial(estimator.recover, recover, found.memory_free))
        found.needs += [need] if need else []
    found.needs += [estimator.export(layout, size) for layout, size in exported.items()]
    # of several processes each needs less, and a limit of memory is kept by another way
    if not config.shard and config.memory is None:
        note_what_does_not_fit(found)


def _exports(found: Diagnosis, estimator: Estimator) -> dict[str, int]:
    """Note which layouts cannot be written, and why; the bytes of those that can."""
    checkpoint = estimator.checkpoint
    layers = [traced.layer for traced in estimator.traced.values()]
    member = next(w for w in found.widths if w.pruned == EXPORTED)
    size = estimator.sizes.export_bytes(member.width)
    if (checkpoint.path / JSON_NAME).is_file():
        plan = found.attempt(lambda: Plan.load(checkpoint.path))
        if plan and plan.budgets[-1] >= EXPORTED:
            size["ragged"] = plan.member(EXPORTED).bytes
    found.exports = dict.fromkeys(LAYOUTS, "")
    try:
        uniform_config(checkpoint, layers, found.widths[0].width // 2)
    except FlexmoeError as error:
        found.exports["uniform"] = str(error)
    return {layout: size[layout] for layout, reason in found.exports.items() if not reason}
