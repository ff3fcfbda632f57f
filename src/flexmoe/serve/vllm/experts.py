"""Routed experts of one vLLM layer: ragged storage, its loading, and the call of the kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.utils import set_weight_attrs

from flexmoe import kernels
from flexmoe.errors import FlexmoeError
from flexmoe.kernels.activations import ACTIVATIONS, gated
from flexmoe.serve.vllm import batch
from flexmoe.serve.vllm.config import LayerTable
from flexmoe.serve.vllm.placement import balanced, local_channels, local_width

SIDES = {"w1": 0, "w3": 1}  # vLLM's names of gate and up; "w2" is down
_LAYERS: dict[str, FlexmoeExperts] = {}  # an operator opaque to the compiler gets a name only


class FlexmoeExperts(FusedMoEMethodBase):
    """The experts of one layer that lie on this rank, each as wide as the richest budget served
    needs it."""

    def __init__(self, moe: FusedMoEConfig, table: LayerTable, name: str):
        super().__init__(moe)
        self.table, self.name = table, name
        parallel = moe.moe_parallel_config
        self.rank, self.ranks = parallel.tp_rank, parallel.tp_size
        self.experts = list(range(len(table.stored_E)))  # those on this rank, by their number
        if parallel.use_ep:
            rank_E = balanced(table.width_BE.sum(0).tolist(), parallel.ep_size)
            self.experts = [e for e in self.experts if rank_E[e] == parallel.ep_rank]
        self.local = {e: at for at, e in enumerate(self.experts)}
        self.loaded: set[tuple[int, str]] = set()
        _LAYERS[name] = self

    def maybe_roundup_sizes(self, hidden_size: int, channels: int, *_: Any) -> tuple[int, int]:
        return hidden_size, channels  # the kernels need no padding

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        return FusedMoEQuantConfig.make()

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Ragged parameters under the names vLLM loads into, and the tables of widths."""
        self._refuse_unsupported(layer)
        run = get_current_vllm_config()
        self.dummy = run.load_config.load_format == "dummy"
        self.offset = [0]
        for e in self.experts:
            self.offset.append(self.offset[-1] + self._width(int(self.table.stored_E[e]), e))
        R, sides = self.offset[-1], 2 if self.moe.is_act_and_mul else 1
        shapes = {"w13_weight": (R, sides, hidden_size), "w2_weight": (R, hidden_size)}
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.empty(shape, dtype=params_dtype), requires_grad=False)
            layer.register_parameter(name, parameter)
            set_weight_attrs(parameter, {"weight_loader": self.load})
        rows = self.table.width_BE.tolist()
        width_BE = [[self._width(row[e], e) for e in self.experts] for row in rows]
        map_E = [self.local.get(e, -1) for e in range(len(self.table.stored_E))]
        for name, table in (("width", width_BE), ("offset", self.offset), ("map", map_E)):
            tensor = torch.tensor(table, dtype=torch.int32)
            layer.register_buffer(f"flexmoe_{name}", tensor, persistent=False)
        batch.reserve(run.scheduler_config.max_num_batched_tokens, layer.w2_weight.device)

    def load(
        self,
        param: nn.Parameter,
        loaded_weight: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Copy this rank's channels of one tensor of one expert; called by vLLM."""
        # in a ragged export an empty tensor stands for what is fused in the hub's layout
        stand_in = loaded_weight.dim() == 1 and not len(loaded_weight)
        if expert_id not in self.local or stand_in:
            return stand_in if return_success else None
        channels = loaded_weight if shard_id in SIDES else loaded_weight.t()
        expected = (int(self.table.in_file_E[expert_id]), param.shape[-1])
        if channels.shape != expected:
            raise FlexmoeError(
                f"{weight_name} of expert {expert_id} comes as channels of shape "
                f"{list(channels.shape)}, the plan says {list(expected)}: these weights are not "
                "the plan's, or vLLM's class for this model reads them in another form"
            )
        at = self.local[expert_id]
        stored = int(self.table.stored_E[expert_id])
        own = local_channels(stored, self.table.quantum, expert_id, self.rank, self.ranks)
        if self.table.order_EI is not None:
            own = self.table.order_EI[expert_id][own].long()
        rows = param.data[self.offset[at] : self.offset[at + 1]]
        rows = rows[:, SIDES[shard_id] % rows.shape[1]] if shard_id in SIDES else rows
        rows.copy_(channels[own.to(channels.device)])
        self.loaded.add((expert_id, shard_id))
        return True if return_success else None

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        missing = len(self.experts) * (3 if self.moe.is_act_and_mul else 2) - len(self.loaded)
        if missing and not self.dummy:
            raise FlexmoeError(
                f"{self.name}: {missing} tensors of single experts were not found in the "
                "checkpoint. vLLM's class for this model may read experts in another form: "
                "try --model-impl transformers"
            )
        name = layer.activation.value.removesuffix("_no_mul")
        self.map_E = layer.flexmoe_map if self.moe.moe_parallel_config.use_ep else None
        self.width_BE = layer.flexmoe_width
        self.weights = kernels.Weights(
            up=layer.w13_weight.data,
            down=layer.w2_weight.data,
            offset_E=layer.flexmoe_offset,
            activate=gated(name) if self.moe.is_act_and_mul else ACTIVATIONS[name],
            activation=name,
        )

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any = None,
        shared_experts_input: Tensor | None = None,
    ) -> Tensor:
        return torch.ops.flexmoe.experts(x, topk_ids, topk_weights, self.name)

    def forward(self, x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor) -> Tensor:
        """What this rank's experts add to every token, each token at its own budget."""
        if self.map_E is not None:
            index_TK = self.map_E[index_TK.long()]
        # A captured graph must not depend on what only Python knows
        mixed = x_TH.is_cuda or batch.single is None
        assert batch.token_budget_T is not None
        token_budget_T = batch.token_budget_T[: len(x_TH)] if mixed else None
        budget = 0 if batch.single is None else batch.single
        return kernels.experts(
            x_TH, index_TK, weight_TK, self.weights, self.width_BE, token_budget_T, budget
        )

    def _width(self, w: int, expert: int) -> int:
        return local_width(w, self.table.quantum, expert, self.rank, self.ranks)

    def _refuse_unsupported(self, layer: RoutedExperts) -> None:
        moe, activation = self.moe, layer.activation.value
        reasons = {
            "experts with biases": moe.has_bias,
            "routing weights on the experts' input": layer.apply_router_weight_on_input,
            "a clamped activation": layer.swiglu_limit is not None,
            f"the activation '{activation}'": activation.removesuffix("_no_mul") not in ACTIVATIONS,
            "tokens exchanged between ranks (data parallel or sequence parallel)": (
                moe.moe_parallel_config.dp_size > 1 or moe.moe_parallel_config.use_all2all_kernels
            ),
        }
        if found := [reason for reason, is_so in reasons.items() if is_so]:
            raise FlexmoeError(
                f"{self.name} has {' and '.join(found)}: not supported on vLLM yet. "
                "Serve it with --engine transformers, or export it uniform and serve that"
            )


def _experts(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, name: str) -> Tensor:
    return _LAYERS[name].forward(x_TH, index_TK, weight_TK)


def _shape(x_TH: Tensor, index_TK: Tensor, weight_TK: Tensor, name: str) -> Tensor:
    return torch.empty_like(x_TH)


_library = torch.library.Library("flexmoe", "FRAGMENT")
_library.define("experts(Tensor x, Tensor index, Tensor weight, str name) -> Tensor")
_library.impl("experts", _experts, "CompositeExplicitAutograd")
torch.library.register_fake("flexmoe::experts", _shape, lib=_library)
