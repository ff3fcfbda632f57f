"""What a checkpoint is and what jobs take at least, in a fraction of a second: plain Python,
without torch and transformers.

What shapes alone cannot tell of an architecture (its layout flags, which config value is the number
of experts a token, what a tensor's name means) stands in ``known.json``, which
``bench/known.py`` writes by asking transformers' own classes; a test compares both for every
architecture. Whatever is not known to the last tensor name is left to `diagnosis.examine`.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from flexmoe.doctor.found import Diagnosis, Layer, widths
from flexmoe.doctor.least import CONTEXT, at_least
from flexmoe.doctor.sizes import Experts, Sizes
from flexmoe.errors import FlexmoeError
from flexmoe.headers import (
    DTYPE_NAMES,
    Headers,
    TensorInfo,
    local_folder,
    read_header,
    read_json,
    refuse_quantized,
    refuse_ragged,
    resolve,
)
from flexmoe.widths import LAYOUTS, coupled_reason

TABLE = Path(__file__).parent / "known.json"
NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")

WINDOW = [["max_position_embeddings"], ["text_config", "max_position_embeddings"]]
DEPTH = [["num_hidden_layers"], ["text_config", "num_hidden_layers"]]

Opened = TypeVar("Opened", bound=Headers)


def glance(model: str | Path, device: str | None = None) -> Diagnosis:
    """What the files say: everything but what only the model's class can refuse; with ``device``
    also what jobs take there at least. Without ``layers`` where the files say too little, without
    ``model_type`` where there is no config.json."""
    found = Diagnosis(str(model))
    folder = found.attempt(lambda: local_folder(model))
    if folder is None:
        return found
    config = found.attempt(lambda: read_json(folder / "config.json"))
    if config is None:
        return found
    found.model_type = str(config.get("model_type"))
    found.attempt(lambda: refuse_quantized(folder, config))
    found.attempt(lambda: refuse_ragged(folder, config))
    headers = found.attempt(lambda: resolve(folder)) and open_headers(Headers, folder, found)
    table = json.loads(TABLE.read_bytes())
    known = table["architectures"].get(found.model_type)
    if headers and known and not config.get("quantization_config"):
        try:
            if known["class"] in (config.get("architectures") or []):
                sizes = _describe(found, headers, known, table["activations"])
                if sizes and device:
                    context = config_value(config, {"places": WINDOW, "default": CONTEXT})
                    if not isinstance(context, int) or context < 1:
                        context = CONTEXT
                    at_least(found, sizes, context, device, table["work"])
        except (ArithmeticError, LookupError, TypeError, ValueError):
            found.layers = []  # values of other kinds than any class takes: transformers says which
    return found


def open_headers(kind: Callable[[Path], Opened], folder: Path, found: Diagnosis) -> Opened | None:
    """The files as `Headers` or `Checkpoint`, or what is wrong with each of them."""
    try:
        return kind(folder)
    except FlexmoeError as error:
        first = str(error)
    for file in sorted(folder.glob("*.safetensors")):
        found.attempt(partial(read_header, folder, file.name))
    if first not in found.problems:
        found.problems.insert(0, first)
    return None


def pattern(name: str) -> str:
    """A tensor's name with ``#`` for its numbers: the same in every layer and expert."""
    return NUMBER.sub("#", name)


def config_value(config: dict[str, Any], known: dict[str, Any]) -> Any:
    """A value of config.json, under any of its names, or the default of the architecture."""
    for place in known["places"]:
        value: Any = config
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return known["default"]


def _describe(
    found: Diagnosis,
    headers: Headers,
    known: dict[str, Any],
    activations: dict[str, str],
) -> Sizes | None:
    tied = known["tie"] is None or config_value(headers.config, known["tie"])
    counted = set(known["tensors"]) | set(known["experts"])
    left_out = set(known["buffers"])
    (left_out if tied else counted).update(known["tied"])
    counted -= left_out
    all_known = counted | left_out
    ignored = re.compile("|".join(known["ignored"]) or "$^")  # where the model has no such thing
    stack = next(iter(known["experts"])).partition("#")[0]  # as "model.layers."
    depth = config_value(headers.config, {"places": DEPTH, "default": None})
    total, present, numbers = 0, set[str](), set[int]()
    shared: dict[int, int] = defaultdict(int)
    routed: dict[int, dict[str, list[TensorInfo]]] = defaultdict(lambda: defaultdict(list))
    stored: dict[int, dict[str, bool]] = defaultdict(dict)
    for name, info in headers.tensors.items():
        kind, number = pattern(name), _layer(name) if name.startswith(stack) else None
        beyond = number is not None and depth is not None and number >= depth
        if beyond or kind not in all_known:
            if ignored.search(name):
                continue
            return None  # of another form than those that are known
        if kind in left_out:
            continue
        present.add(kind)
        numbers |= {number} if number is not None else set()
        total += math.prod(info.shape)
        if kind in known["experts"]:
            routed[_layer(name)][kind].append(info)
            stored[_layer(name)][name] = known["experts"][kind]["fused"]
        elif kind in known["shared"]:
            shared[_layer(name)] += math.prod(info.shape)
    activation = known["activation"]
    if isinstance(activation, dict):
        activation = activations.get(config_value(headers.config, activation))
    layers = []
    for i, tensors in sorted(routed.items()):
        sizes = _sizes(tensors, known["experts"])
        if sizes is None or activation is None:
            return None
        layers.append(Layer(i, *sizes, activation, tuple(known["flags"]), shared[i]))
    top_k = config_value(headers.config, known["top_k"])
    narrowest = min((layer.channels for layer in layers), default=0)
    width = config_value(headers.config, {"places": [known["width"]], "default": None})
    if width != narrowest or not isinstance(top_k, int):
        return None
    if top_k > min(layer.experts for layer in layers) or depth not in (None, len(numbers)):
        return None  # not as config.json says
    sizes_of = {i: _parameters(tensors) for i, tensors in routed.items()}
    idle = sum(sizes_of[layer.index] * (1 - top_k / layer.experts) for layer in layers)
    first = next(iter(next(iter(routed.values())).values()))[0]
    kinds = sorted(kind for kind, names in known["coupled"].items() if present & set(names))
    found.architecture = known["class"]
    found.dtype, found.layers, found.experts_per_token = DTYPE_NAMES[first.dtype], layers, top_k
    found.parameters = {
        "total": total,
        "routed": sum(sizes_of.values()),
        "shared": sum(shared.values()),
        "active": round(total - idle),
    }
    found.widths, found.exports = widths(narrowest), dict.fromkeys(LAYOUTS, "")
    if kinds:
        found.exports["uniform"] = coupled_reason(known["width"], kinds)
    gated, biased = (flag in known["flags"] for flag in ("has_gate", "has_bias"))
    experts = [
        Experts(x.experts, x.channels, x.hidden, (gated + 2) * x.hidden + (gated + 1) * biased)
        for x in layers
    ]
    return Sizes(headers.tensors, stored, experts, total, found.parameters["routed"], gated)


def _layer(name: str) -> int:
    number = NUMBER.search(name)
    assert number is not None  # experts stand in numbered layers
    return int(number[0])


def _sizes(
    tensors: dict[str, list[TensorInfo]], known: dict[str, Any]
) -> tuple[int, int, int] | None:
    """Experts, channels and hidden size of a layer; None if its tensors do not agree."""
    sizes = set()
    for kind in known:
        axis, sides, fused = (known[kind][key] for key in ("axis", "sides", "fused"))
        infos = tensors.get(kind, [])
        if axis is None:
            continue  # a down bias
        for shape in {info.shape for info in infos}:
            E = shape[0] if fused else len(infos)
            H = next((shape[a] for a in (-1, -2) if a != axis and len(shape) - fused == 2), None)
            sizes.add((E, shape[axis] // len(sides), H))
        if not infos:
            return None
    hidden = {H for _, _, H in sizes if H is not None}
    counts = {(E, channels) for E, channels, _ in sizes}
    return (*counts.pop(), hidden.pop()) if len(hidden) == len(counts) == 1 else None


def _parameters(tensors: Mapping[str, Sequence[TensorInfo]]) -> int:
    return sum(math.prod(info.shape) for infos in tensors.values() for info in infos)
