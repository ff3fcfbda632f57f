"""What doctor knows of architectures before it loads transformers: found by asking its classes.

    python bench/known.py              # writes src/flexmoe/doctor/known.json, in some minutes

Tiny models without weights are built of every architecture on the experts interface, once as in the
tests and then with one config value after the other changed. That shows all tensor names that a
checkpoint may have, and which value sets the experts a token, the activation and the width.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from copy import deepcopy
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from flexmoe.checkpoint import Checkpoint, meta_model, read_config
from flexmoe.config import CompressConfig
from flexmoe.doctor.diagnosis import activation_name, is_shared
from flexmoe.doctor.dryrun import DryRun
from flexmoe.doctor.estimates import Estimator
from flexmoe.doctor.glance import TABLE, glance, pattern
from flexmoe.doctor.least import EXPORT
from flexmoe.doctor.machine import Rates
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.names import Names
from flexmoe.recover_config import MODES, RecoverConfig
from flexmoe.settings import Place, places
from flexmoe.trace import trace
from glance import write_headers
from zoo import DECODERS, model_class, tiny_model

LISTS: dict[str, list[Any]] = {  # layers of other kinds
    "mlp_only_layers": [[0]],
    "mlp_layer_types": [["dense", "sparse"]],
}
Config = dict[str, Any]


class Architecture:
    """One architecture: its config.json and how to build it from another."""

    def __init__(self, model_type: str, folder: Path):
        self.folder = folder
        tiny_model(model_type).save_pretrained(folder)
        self.config = read_config(folder)
        default = CONFIG_MAPPING[model_type]()
        self.defaults, self.aliases = default.to_dict(), dict(type(default).attribute_map)
        if text := type(default).sub_configs.get("text_config"):
            self.aliases |= text.attribute_map
        self.name = model_class(model_type).__name__

    def build(self, config: Config) -> PreTrainedModel | None:
        try:
            return meta_model(self.folder, deepcopy(config))
        except (FlexmoeError, ImportError):
            return None

    def full(self) -> Config:
        """The config with all its values, those that are defaults too."""
        network = self.build(self.config)
        assert network is not None
        found = network.config.to_dict()
        found["architectures"] = [self.name]
        return found

    def known_as(self, place: Place) -> dict[str, Any]:
        """Where a value stands in a config.json, under all its names, and its default."""
        names = [place[-1], *(a for a, name in self.aliases.items() if name == place[-1])]
        value: Any = self.defaults
        for key in place:
            value = (value or {}).get(key)
        return {"places": [[*place[:-1], name] for name in names], "default": value}


def flat(config: Config) -> Iterator[Place]:
    """The places of the language model's values."""
    for key, value in config.items():
        if key == "text_config":
            yield from (("text_config", inner) for inner in value)
        elif not isinstance(value, dict):
            yield (key,)


def at(config: Config, place: Place) -> Any:
    for key in place:
        config = config[key]
    return config


def changed(config: Config, place: Place, value: Any) -> Config:
    new = deepcopy(config)
    at(new, place[:-1])[place[-1]] = value
    return new


def variants(config: Config) -> Iterator[Config]:
    """The config with one value changed at a time."""
    for place in flat(config):
        value, others = at(config, place), []
        if isinstance(value, bool):
            others = [not value]
        elif isinstance(value, int):
            others = [n for n in (None, 0, 1, 2, 4) if n != value]
        elif value is None:
            others = [True, 8]
        others += LISTS.get(place[-1], [])
        yield from (changed(config, place, other) for other in others)


def stored_names(network: PreTrainedModel) -> dict[str, tuple[str, str]]:
    """Names in a checkpoint of this model: the parameter each is loaded into, and what it is."""
    stored = revert_weight_conversion(network, dict(network.state_dict()))
    parameters = {name for name, _ in network.named_parameters()}
    tied = set(getattr(network, "all_tied_weights_keys", None) or {})
    layers = expert_layers(network)
    found = {}
    for target, patterns in Names(network).groups(stored).items():
        kind = "tied" if target in tied else "tensors" if target in parameters else "buffers"
        if kind == "tensors" and any(is_shared(target, layer) for layer in layers):
            kind = "shared"
        found |= {name: (target, kind) for names in patterns.values() for name in names}
    return found


def shapes(network: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in network.named_parameters()}


def width_places(
    config: Config, network: PreTrainedModel, build: Callable[[Config], PreTrainedModel | None]
) -> dict[Place, set[str]]:
    """The values that set the experts' width, and the other parameters each of them sets."""
    layers, before, found = expert_layers(network), shapes(network), {}
    experts = {f"{layer.name}.{name}" for layer in layers for name in layer.parameters}
    full = layers[0].I
    for place in sorted(places(config, full), key=lambda place: "intermediate" not in place[-1]):
        other = build(changed(config, place, max(1, full // 2)))
        if other is not None:
            after = shapes(other)
            moved = {name for name in before if before[name] != after.get(name)}
            if moved >= experts:
                found[place] = moved - experts
    return found


def setting_of(
    architecture: Architecture,
    config: Config,
    other: Callable[[Any], Any],
    moves: Callable[[PreTrainedModel], bool],
) -> dict[str, Any] | None:
    """The place where ``other`` of a value (None: not this one) gives a model that ``moves``."""
    for place in flat(config):
        value = other(at(config, place))
        network = None if value is None else architecture.build(changed(config, place, value))
        try:
            if network is not None and moves(network):
                return architecture.known_as(place)
        except FlexmoeError:
            continue  # a model that is refused, with no routed experts for instance
    return None


def top_k(network: PreTrainedModel) -> int | None:
    dry = DryRun(network, torch.float32)
    try:
        dry.forward(1, 2)
    except RuntimeError:
        pass
    return dry.top_k


def describe(model_type: str, folder: Path) -> dict[str, Any] | str:
    """The entry of one architecture, or why there is none."""
    architecture = Architecture(model_type, folder)
    config = architecture.full()
    network = architecture.build(config)
    assert network is not None
    layer, checkpoint = expert_layers(network)[0], Checkpoint(folder)
    number = top_k(architecture.build(config))
    if not number:
        return "its forward pass cannot be tried on shapes"
    per_token = setting_of(
        architecture,
        config,
        lambda value: value - 1 if type(value) is int and value == number else None,
        lambda built: top_k(built) == number - 1,
    )
    if per_token is None:  # a constant of its router
        per_token = {"places": [], "default": number}
    acts = setting_of(
        architecture,
        config,
        lambda value: "tanh" if isinstance(value, str) and value in ACT2CLS else None,
        lambda built: activation_name(expert_layers(built)[0]) == "Tanh",
    )
    ties = len(getattr(network, "all_tied_weights_keys", None) or {})
    tie = setting_of(
        architecture,
        config,
        lambda value: not value if isinstance(value, bool) else None,
        lambda built: len(getattr(built, "all_tied_weights_keys", None) or {}) != ties,
    )
    setting = width_places(config, network, architecture.build)
    if not setting:
        return "no value of its config sets the width"
    width = min(setting, key=lambda place: len(setting[place]))
    names: dict[str, set[str]] = {k: set() for k in ("tensors", "shared", "buffers", "tied")}
    coupled: dict[str, set[str]] = {}
    for variant in (config, *variants(config)):
        built = architecture.build(variant)
        try:
            stored = stored_names(built) if built is not None else {}
        except (FlexmoeError, RuntimeError, ValueError, LookupError, TypeError, AttributeError):
            continue
        if built is None:
            continue
        new = False
        for name, (_, kind) in stored.items():
            new |= pattern(name) not in names[kind]
            names[kind].add(pattern(name))
        if new:  # only then can the width set something else
            for parameter in width_places(variant, built, architecture.build).get(width, ()):
                kind = re.sub(r"\.\d+\.", ".N.", parameter)
                here = {
                    pattern(name) for name, (target, _) in stored.items() if target == parameter
                }
                coupled.setdefault(kind, set()).update(here)
    experts = {
        pattern(piece.name): {
            "axis": piece.axis,
            "sides": list(piece.sides),
            "fused": piece.expert is None,
        }
        for traced in trace(checkpoint, network).values()
        for piece in traced.stored
    }
    names["tensors"] |= names["shared"]
    return {
        "class": architecture.name,
        "flags": list(layer.flags),
        "activation": acts or activation_name(layer),
        "top_k": per_token,
        "tie": tie,
        "width": list(width),
        "coupled": {kind: sorted(found) for kind, found in sorted(coupled.items())},
        "experts": experts,
        **{kind: sorted(found - set(experts)) for kind, found in names.items()},
        "ignored": list(network._keys_to_ignore_on_load_unexpected or []),
    }


def main() -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    getLogger("torch._subclasses.fake_tensor").setLevel(CRITICAL)  # top-k of wrong shapes
    table = json.loads(TABLE.read_text())["architectures"] if sys.argv[1:] else {}
    counted = work()
    for model_type in sys.argv[1:] or DECODERS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                entry = describe(model_type, Path(folder))
            except FlexmoeError as error:
                entry = str(error)
        if isinstance(entry, str):
            print(f"{model_type}: left out, {entry}", flush=True)
            table.pop(model_type, None)
        else:
            table[model_type] = entry
            print(model_type, len(entry["tensors"]), list(entry["coupled"]), flush=True)
        write(table, counted)  # of what there is so far
    print(f"wrote {TABLE}: {len(table)} architectures, {TABLE.stat().st_size} bytes")


def work() -> dict[str, float]:
    """Operations of jobs with default settings for every active parameter, of Qwen3-30B-A3B; of an
    export the bytes moved for every byte of the checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        write_headers(Path(folder) / "large")
        estimator = Estimator.open(Path(folder) / "large", "cpu")
        active = glance(Path(folder) / "large").parameters["active"]
        estimator._rates[torch.float32] = Rates(active, float("inf"))
        needs = [estimator.compress(CompressConfig(data="tiny"))]
        needs += [estimator.recover(RecoverConfig(mode=mode), 2**40) for mode in MODES]
        estimator._rates[torch.float32] = Rates(float("inf"), estimator.checkpoint.bytes)
        found = {need.job: float(f"{need.seconds:.3g}") for need in needs}
        return found | {EXPORT: estimator.files}


def write(table: dict[str, Any], counted: dict[str, float]) -> None:
    """One line an architecture, so that a change can be read."""
    lines = ",\n".join(f'"{name}": {json.dumps(table[name])}' for name in sorted(table))
    head = {
        "transformers": transformers.__version__,
        "work": counted,
        "activations": activations(),
    }
    TABLE.write_text(json.dumps(head)[:-1] + f',\n"architectures": {{\n{lines}\n}}}}\n')


def activations() -> dict[str, str]:
    """The class of each activation by its name in a config."""
    return {
        name: (found[0] if isinstance(found, tuple) else found).__name__
        for name, found in sorted(ACT2CLS.items())
    }


if __name__ == "__main__":
    main()
