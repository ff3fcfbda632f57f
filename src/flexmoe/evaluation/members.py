"""What one evaluation compares: budgets of a family, one model, and perhaps the base of either."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from flexmoe.checkpoint import Checkpoint
from flexmoe.experts import expert_layers, routed_parameters
from flexmoe.family import pick_device, set_budget
from flexmoe.memory import free_memory
from flexmoe.policies import Fitted, stop
from flexmoe.routing.edits import Work, is_edited

BASE = "base"  # the key of a base that is another model; else a key is a pruned share
Key = float | str
# Each gives the model that computes it, and nothing else may be opened while that is used.
Members = Mapping[Key, Callable[[], nn.Module]]

USABLE = 0.8  # of the free memory: activations come on top of the weights


@dataclass
class How:
    """What the router does in a member: the ``rule`` where whole experts go (None: the plan's), a
    run-time ``policy``; ``work`` counts by layer what its experts compute then."""

    rule: str | None = None
    policy: Fitted | None = None
    work: dict[int, Work] = field(default_factory=dict)

    def set(self, model: PreTrainedModel, pruned: float | None) -> PreTrainedModel:
        """The model at a budget (None: it has none) with this router."""
        if self.policy is not None:
            self.policy.fit(model)
        if pruned is not None:
            set_budget(model, pruned, self.rule)
        if self.policy is not None:
            self.policy.use(model)
        modules = [(layer, layer.module) for layer in expert_layers(model)]
        if self.policy is None and any(hasattr(module, "flexmoe_policy") for _, module in modules):
            stop(model)
        for layer, module in modules if any(is_edited(m) for _, m in modules) else ():
            module.flexmoe_work = self.work.setdefault(layer.index, Work(layer.I))
        return model

    @property
    def share(self) -> dict[str, float] | None:
        """The shares of pairs and of channels that were computed, of all that routers asked for;
        None where nothing was left out at the router."""
        routed = sum(work.routed for work in self.work.values())
        if not routed:
            return None
        channels = sum(work.routed * work.full for work in self.work.values())
        return {
            "pairs": sum(work.pairs for work in self.work.values()) / routed,
            "channels": sum(work.channels for work in self.work.values()) / channels,
        }


def budgets_of(model: PreTrainedModel, budgets: Iterable[float]) -> Members:
    """The members at ``budgets`` of a model that switches (see `flexmoe.load`)."""
    return {pruned: partial(_at, lambda: model, pruned, How()) for pruned in budgets}


def _at(opened: Callable[[], PreTrainedModel], pruned: float | None, how: How) -> PreTrainedModel:
    return how.set(opened(), pruned)


class Shelf:
    """Models by name, loaded when they are first asked for. Where they do not fit ``together``,
    the one before goes first. ``routed`` counts the routed-expert parameters of those that were
    loaded, ``dtypes`` has their dtypes."""

    def __init__(self, loaders: Mapping[str, Callable[[], PreTrainedModel]], *, together: bool):
        self.loaders, self.together = loaders, together
        self.models: dict[str, PreTrainedModel] = {}
        self.routed: dict[str, int] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def open(self, name: str) -> PreTrainedModel:
        """The model of that name."""
        if name not in self.models:
            if not self.together:
                self.models.clear()
            model = self.models[name] = self.loaders[name]()
            self.routed[name], self.dtypes[name] = routed_parameters(model), model.dtype
        return self.models[name]

    def member(self, name: str) -> Callable[[], nn.Module]:
        """The model of that name as it is."""
        return partial(self.open, name)

    def budget(self, name: str, pruned: float | None, how: How) -> Callable[[], nn.Module]:
        """The model of that name, switched to a budget (None: it has none)."""
        return partial(_at, partial(self.open, name), pruned, how)


def fit_together(folders: Iterable[Path], device: str) -> bool:
    """Whether the weights of all ``folders`` fit in the memory that is free on ``device``: on the
    CPU in float32."""
    where = pick_device(device)
    found = [Checkpoint(folder) for folder in folders]
    if where.type == "cuda":
        need = sum(checkpoint.bytes for checkpoint in found)
    else:
        shapes = [info.shape for checkpoint in found for info in checkpoint.tensors.values()]
        need = 4 * sum(map(math.prod, shapes))
    return need <= USABLE * free_memory(where)


def device_of(model: nn.Module) -> torch.device:
    """Where its tokens go: weights on the meta device are on disk until they are needed."""
    there = (p.device for p in model.parameters() if not p.is_meta)
    return next(there, torch.device("cpu"))  # accelerate carries them on
