"""Low-rank adapters on the fused experts by peft, merged into the weights at the end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers

NEEDS_PEFT = "mode 'lora' needs peft: pip install 'flexmoe[recover]'"


class Adapter:
    """The adapter inside a model: what it trains, and the model without it."""

    def __init__(self, tuner: Any, down: dict[int, Any]):
        self._tuner, self._down = tuner, down

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The low-rank factors."""
        return [p for name, p in self._tuner.named_parameters() if "lora_" in name]

    @contextmanager
    def off(self) -> Iterator[None]:
        """The model without the adapter, inside the block."""
        self._tuner.disable_adapter_layers()
        try:
            yield
        finally:
            self._tuner.enable_adapter_layers()

    @torch.no_grad()
    def only_first(self, width: Mapping[int, Tensor]) -> None:
        """Let the first ``width`` [E] channels of each layer's experts alone change, as the paper
        does: the factor of the down projection begins at zero for the others and gets no gradient
        from a member that does not keep them. (That of gate and up begins at zero everywhere.)"""
        for i, wrapper in self._down.items():
            for name in wrapper.lora_A:
                factor = wrapper.lora_A[name].weight
                E, I = wrapper.num_experts, factor.shape[1]
                outside_EI = torch.arange(I) >= width[i][:, None]
                view = factor.view(E, -1, I)  # (experts, rank, channels)
                view[outside_EI[:, None].expand_as(view).to(factor.device)] = 0


@contextmanager
def lora_experts(model: PreTrainedModel, *, rank: int, seed: int) -> Iterator[Adapter]:
    """Adapters of ``rank`` on all weight matrices of the routed experts inside the block; merged
    into the experts when it ends well, taken away when it does not."""
    try:
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel
    except ImportError:
        raise FlexmoeError(NEEDS_PEFT) from None
    layers = expert_layers(model)
    names = [
        f"{layer.name}.{name}"
        for layer in layers
        for name, parameter in layer.parameters.items()
        if parameter.dim() == 3
    ]
    config = LoraConfig(r=rank, lora_alpha=rank, target_parameters=names, target_modules=[])
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tuner = LoraModel(model, config, "flexmoe")
    index = {id(layer.module): layer.index for layer in layers}
    down = {
        index[id(module.get_base_layer())]: module
        for module in model.modules()
        if getattr(module, "parameter_name", None) == "down_proj"
    }
    try:
        yield Adapter(tuner, down)
    except BaseException:
        tuner.unload()
        raise
    tuner.merge_and_unload()
