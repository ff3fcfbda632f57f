"""The ``flexmoe`` quantization method of vLLM: what is served, as read from the model folder.

Three things can be served: a ragged export (its config.json says everything), a family
(``--quantization flexmoe``; ``flexmoe.json`` lies beside the weights) and an untouched base model
with a plan alone (``--hf-overrides`` names the plan, see `flexmoe.serve.vllm.launch`). The last
two, and a model without any plan, can have the tasks of a pattern store beside the budgets.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import (
    QuantizationConfig,
    QuantizeMethodBase,
)
from vllm.model_executor.models.utils import extract_layer_index

from flexmoe.errors import FlexmoeError
from flexmoe.family import check_base, find_folder
from flexmoe.hf import FORMAT
from flexmoe.kernels import check_forced
from flexmoe.plan import JSON_NAME, Plan, read_manifest
from flexmoe.premoe import Pattern, Store
from flexmoe.serve.ids import label
from flexmoe.serve.tasks import check_store, widths_of
from flexmoe.serve.vllm import compat


@dataclass(frozen=True)
class LayerTable:
    """Widths of one MoE layer's experts. ``width_BE`` int32, one row a budget or task served;
    ``stored_E`` what is in memory, ``in_file_E`` what the checkpoint has; ``order_EI`` where the
    checkpoint's channels must be put in order while loading."""

    width_BE: Tensor
    stored_E: Tensor
    in_file_E: Tensor
    order_EI: Tensor | None
    quantum: int


class FlexmoeConfig(QuantizationConfig):
    """``shares`` are the budgets served, richest first; no channel beyond the richest is kept.
    ``tasks`` are those of the pattern store, ``planned`` whether there is a plan."""

    def __init__(self, asked: dict[str, Any]):
        super().__init__()
        self.asked = asked
        self.folder: str | None = None
        self.shares: tuple[float, ...] = ()
        self.tasks: tuple[str, ...] = ()
        self.planned = True
        if "widths" in asked:  # a ragged export: one member
            if asked.get("format") != FORMAT:
                raise FlexmoeError(
                    f"this export has format {asked.get('format')}, vLLM serves format {FORMAT}: "
                    "where constants stand for experts, use --engine transformers"
                )
            self.shares = (float(asked.get("pruned", 0.0)),)

    def get_name(self) -> str:
        return "flexmoe"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return [JSON_NAME]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> FlexmoeConfig:
        return cls(config)

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Find the plan: beside the model, or where ``--hf-overrides`` says. vLLM calls this once,
        before any worker starts, so what is wrong with the plan is said here."""
        check_forced()
        if self.shares:
            return
        folder = find_folder(self.asked.get("plan") or model_name)
        self.folder, store = str(folder), self.asked.get("patterns")
        self.planned = (folder / JSON_NAME).is_file() or store is None
        if self.planned:
            self.shares = self._planned_shares(model_name, hf_config)
        else:
            self.shares = (0.0,)
        if store is not None:
            if self.shares[0]:
                raise FlexmoeError("tasks need the full model: serve budget 0, too")
            keep = self.asked.get("keep")
            if not isinstance(keep, int | float):
                raise FlexmoeError(
                    f"patterns are given and keep is {keep!r}: expected the share of the experts "
                    "that each task keeps, such as 0.5"
                )
            recipe = read_manifest(folder).recipe if self.planned else None
            check_store(Store(store), model_name, recipe)
            self.tasks = tuple(pattern.task for pattern in load_patterns(store))
            for task in self.tasks:
                if task in map(label, self.shares):
                    raise FlexmoeError(
                        f"task '{task}' of {store} is called as a budget is: delete it and profile "
                        "it under another name"
                    )
                task_widths(store, task, keep)  # refuses a share out of reach

    def _planned_shares(self, model_name: str, hf_config: Any) -> tuple[float, ...]:
        assert self.folder is not None
        plan = load_plan(self.folder)
        plan.check_router_kept("a server switches widths and no routers")
        if not is_ranked(self.folder):
            check_base(plan, find_folder(model_name))
        if hf_config is not None and hf_config.model_type != plan.recipe.model_type:
            raise FlexmoeError(
                f"the plan in {self.folder} is for model_type '{plan.recipe.model_type}', "
                f"{model_name} has '{hf_config.model_type}'"
            )
        asked = self.asked.get("shares", plan.budgets)
        shares = tuple(sorted(float(share) for share in asked))
        for share in shares:
            plan.widths(share)  # refuses what is out of reach
        return shares

    @cached_property
    def rows(self) -> dict[str, int]:
        """Row of the width tables for each budget served, richest first, and then each task."""
        names = [*map(label, self.shares), *self.tasks]
        return {name: row for row, name in enumerate(names)}

    def layer(self, index: int) -> LayerTable | None:
        """Widths of decoder layer ``index``; None where the plan has none."""
        if self.folder is None:
            found = self.asked["widths"].get(str(index))
            if found is None:
                return None
            width_E = torch.tensor(found, dtype=torch.int32, device="cpu")
            return LayerTable(width_E[None], width_E, width_E, None, self.asked.get("quantum", 1))
        plan = load_plan(self.folder) if self.planned else None
        layers = plan.layers if plan else load_patterns(self.asked["patterns"])[0].layers
        if index not in layers:
            return None
        shape = layers[index]
        full_E = torch.full((shape.experts,), shape.channels, dtype=torch.int32, device="cpu")
        rows = [widths(self.folder, s)[index] if plan else full_E for s in self.shares]
        rows += [
            task_widths(self.asked["patterns"], task, self.asked["keep"])[index]
            for task in self.tasks
        ]
        width_BE = torch.stack(rows).int()
        return LayerTable(
            width_BE=width_BE,
            stored_E=width_BE[0],
            in_file_E=full_E,
            order_EI=plan.order[index] if plan and not is_ranked(self.folder) else None,
            quantum=plan.quantum if plan else 1,
        )

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from flexmoe.serve.vllm.experts import FlexmoeExperts

        if isinstance(layer, RoutedExperts):
            compat.check_run(get_current_vllm_config())
            compat.mend_rotary_on_cpu()
            compat.mend_router_on_cpu()
            index = extract_layer_index(prefix)
            table = self.layer(index)
            return table and FlexmoeExperts(layer.moe_config, table, prefix)
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None


@lru_cache(maxsize=4)
def load_plan(folder: str) -> Plan:
    return Plan.load(folder)


@cache
def widths(folder: str, share: float) -> dict[int, Tensor]:
    return load_plan(folder).widths(share)


@lru_cache(maxsize=4)
def is_ranked(folder: str) -> bool:
    return read_manifest(folder).ranked


@lru_cache(maxsize=4)
def load_patterns(store: str) -> list[Pattern]:
    return Store(store).load_all()


@cache
def task_widths(store: str, task: str, keep: float) -> dict[int, Tensor]:
    return widths_of(next(p for p in load_patterns(store) if p.task == task), keep)
