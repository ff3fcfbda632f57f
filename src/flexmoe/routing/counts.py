"""How many experts a model has, as its config says it, and models with fewer.

Which key holds the count, which the experts a token is sent to, which tensors beside the experts
have a row for each of them, and whether the router picks within groups: all of it is found by
trying. Models without weights are built from the config with one number changed, and run on two
tokens on the meta device; what changes shape, and what does not run, says it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from flexmoe.checkpoint import UNBUILDABLE
from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers, experts_function
from flexmoe.settings import Place, places, with_value, with_values

Build = Callable[[Mapping[str, Any]], PreTrainedModel]  # the model of a config, on the meta device


def builder(model: PreTrainedModel) -> Build:
    """Models of the class of ``model`` from configs such as ``model.config.to_dict()``."""

    def build(config: Mapping[str, Any]) -> PreTrainedModel:
        settings = type(model.config).from_dict(dict(config))
        with torch.device("meta"):
            return type(model)._from_config(settings)

    return build


@dataclass(frozen=True)
class Counts:
    """Where a config has its counts, see `find_counts`.

    ``experts``: the place of the number of experts; ``per_token``: of how many of them a token is
    sent to, ``K``. ``groups``: experts can only go in equal numbers from each of so many groups
    of neighbours. ``rows``: by layer the tensors beside the experts with a row for each, and the
    axis of it; ``blocks``: by layer the module that holds all of these and the experts.
    """

    build: Build
    config: Mapping[str, Any]
    experts: Place
    E: int
    per_token: Place | None
    K: int
    groups: int
    rows: dict[int, dict[str, int]]
    blocks: dict[int, str]

    def settings(self, kept: int) -> dict[Place, int]:
        """What a config says of ``kept`` experts a layer, and no more than those for a token. The
        count stands under all names that the config's class knows it by: engines read one or
        another."""
        names = [self.experts, *_spellings(self.build(self.config).config, self.experts)]
        values = dict.fromkeys(names, kept)
        if kept < self.K:
            if self.per_token is None:
                raise FlexmoeError(
                    f"{kept} experts are fewer than the {self.K} that a token is sent to, and no "
                    "value in config.json sets that number: keep more, or the router as it is "
                    "(--router keep)"
                )
            names = [self.per_token, *_spellings(self.build(self.config).config, self.per_token)]
            values |= dict.fromkeys(names, kept)
        return values

    def model(self, kept: int) -> PreTrainedModel:
        """The model of these `settings` on the meta device; `FlexmoeError` if it cannot run."""
        model = self.build(with_values(self.config, self.settings(kept)))
        if _per_token(model) is None:
            raise FlexmoeError(
                f"a router of this architecture cannot choose among {kept} of its {self.E} experts"
                + f" ({self.groups} groups)" * (self.groups > 1)
                + ": keep more, or the router as it is (--router keep)"
            )
        return model


def find_counts(config: Mapping[str, Any], build: Build) -> Counts:
    """Where ``config`` has its counts. Raises `FlexmoeError` where experts cannot be taken out of
    the router of this architecture."""
    full = build(config)
    layers = expert_layers(full)
    E = layers[0].E
    if any(layer.E != E for layer in layers):
        raise FlexmoeError("the layers have different numbers of experts, config.json names one")
    K = _per_token(full)
    if K is None:
        raise _refused("its router cannot be tried without weights")
    place = _experts_place(config, build, layers, E)
    rows = _rows(full, build(with_value(config, place, E // 2)), layers, E)
    return Counts(
        build=build,
        config=config,
        experts=place,
        E=E,
        per_token=_per_token_place(config, build, K),
        K=K,
        groups=_groups(config, build, place, E),
        rows=rows,
        blocks={layer.index: _common([layer.name, *rows[layer.index]]) for layer in layers},
    )


def _refused(why: str) -> FlexmoeError:
    return FlexmoeError(
        f"experts cannot be taken out of the router of this architecture: {why}. Use --router keep"
    )


def _try(build: Build, config: Mapping[str, Any]) -> PreTrainedModel | None:
    try:
        return build(config)
    except (FlexmoeError, *UNBUILDABLE):
        return None


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _experts_place(
    config: Mapping[str, Any], build: Build, layers: list[ExpertLayer], E: int
) -> Place:
    named = {f"{layer.name}.{name}" for layer in layers for name in layer.parameters}
    before = _tensors(build(config))
    for place in sorted(places(config, E), key=lambda place: "expert" not in place[-1]):
        other = _try(build, with_value(config, place, E // 2))
        if other is None:
            continue  # another number than the count
        after = _tensors(other)
        if all(n in after and after[n].shape[0] == E // 2 for n in named) and before.keys() == (
            after.keys()
        ):
            return place
    raise _refused(f"no value in config.json sets the number {E} of experts")


def _rows(
    full: nn.Module, half: nn.Module, layers: list[ExpertLayer], E: int
) -> dict[int, dict[str, int]]:
    rows: dict[int, dict[str, int]] = {layer.index: {} for layer in layers}
    decoder = {
        layer.name.split(f".{layer.index}.")[0] + f".{layer.index}.": layer for layer in layers
    }
    after = _tensors(half)
    for name, tensor in _tensors(full).items():
        if tensor.shape == after[name].shape or any(
            name.startswith(f"{layer.name}.") for layer in layers
        ):
            continue
        axes = [d for d in range(tensor.dim()) if tensor.shape[d] != after[name].shape[d]]
        of = next((layer for start, layer in decoder.items() if name.startswith(start)), None)
        if of is None or len(axes) != 1 or tensor.shape[axes[0]] != E:
            raise _refused(f"{name} {list(tensor.shape)} depends on their number in another way")
        rows[of.index][name] = axes[0]
    for layer in layers:
        if not rows[layer.index]:
            raise _refused(f"no tensor beside {layer.name} has a row for each expert")
    return rows


def _common(names: list[str]) -> str:
    """The innermost module that holds all of these tensors and modules."""
    parents = [name.replace(".", "/").rpartition("/")[0] for name in names]
    return os.path.commonpath(parents).replace("/", ".")


def _spellings(config: Any, place: Place) -> Iterator[Place]:
    """The other keys under which the config's class knows the value at ``place``."""
    for key in place[:-1]:
        config = getattr(config, key)
    for alias, real in config.attribute_map.items():
        if place[-1] in (alias, real):
            yield from ((*place[:-1], key) for key in (alias, real) if key != place[-1])


def _per_token_place(config: Mapping[str, Any], build: Build, K: int) -> Place | None:
    for place in sorted(places(config, K), key=lambda place: "tok" not in place[-1]):
        other = _try(build, with_value(config, place, K - 1)) if K > 1 else None
        if other is not None and _per_token(other) == K - 1:
            return place
    return None


def _groups(config: Mapping[str, Any], build: Build, place: Place, E: int) -> int:
    """The smallest number of experts that can go, which is that of the router's groups."""
    for number in range(1, E):
        other = _try(build, with_value(config, place, E - number)) if E % number == 0 else None
        if other is not None and _per_token(other) is not None:
            return number
    raise _refused(f"it does not run with any other number than {E}")


def _shape_forward(module: nn.Module, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Registered as ``flexmoe_shape``: does nothing but note how many experts a token has."""
    module.flexmoe_seen.append(index_TK.shape[1])
    return torch.zeros_like(x_TH)


ALL_EXPERTS_FUNCTIONS.register("flexmoe_shape", _shape_forward)


def _per_token(model: PreTrainedModel) -> int | None:
    """How many experts a token is sent to; None if the model does not run on the meta device."""
    seen: list[int] = []
    for layer in expert_layers(model):
        layer.module.flexmoe_seen = seen
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), experts_function(model, "flexmoe_shape"):
            model.eval()(input_ids=ids, use_cache=True)  # without, masks look at values
    except (NotImplementedError, *UNBUILDABLE):
        return None
    return min(seen, default=None)
