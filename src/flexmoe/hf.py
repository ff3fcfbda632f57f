"""transformers plug-in: a ragged export loads and saves like any other checkpoint.

After ``import flexmoe``, ``AutoModelForCausalLM.from_pretrained(folder)`` gives the stock class
whose experts modules keep the channels of all experts in one ragged parameter, see
`flexmoe.kernels.interface.Weights` for its layout. transformers calls such a plug-in a quantizer.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightTransform
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers

FORMAT = 1  # of quantization_config in the config.json of a ragged export
WITH_CONSTANTS = 2  # of one whose experts that are gone add a constant
CONSTANT = "flexmoe_constant_EH"  # their buffer in an experts module
# Names of single experts' sides where the hub has one tensor for all experts, below the experts
# module and the expert's number.
LEAVES = {
    "gate": "gate_proj.weight",
    "up": "up_proj.weight",
    "down": "down_proj.weight",
    "gate_bias": "gate_proj.bias",
    "up_bias": "up_proj.bias",
}
SIDES_OF = {
    "gate_up_proj": ("gate", "up"),
    "up_proj": ("up",),
    "down_proj": ("down",),
    "gate_up_proj_bias": ("gate_bias", "up_bias"),
    "up_proj_bias": ("up_bias",),
}


@register_quantization_config("flexmoe")
class FlexmoeConfig(QuantizationConfigMixin):
    """``quantization_config`` of a ragged export: ``widths`` maps the number of a decoder layer
    to the channels of each of its experts; in format 2 those without channels add what the tensor
    `CONSTANT` of their layer says. Raises `FlexmoeError` if it cannot be used."""

    def __init__(
        self,
        quant_method: str = "flexmoe",
        format: int | None = None,
        widths: dict[str, list[int]] | None = None,
        quantum: int = 1,
        pruned: float = 0.0,
        **unknown: Any,
    ):
        if format not in (FORMAT, WITH_CONSTANTS):
            raise FlexmoeError(
                f"the ragged export has format {format}, this flexmoe reads format {FORMAT} and "
                f"{WITH_CONSTANTS}: update flexmoe or export again"
            )
        if unknown or not isinstance(widths, dict) or not all(map(_are_widths, widths.values())):
            raise FlexmoeError(
                "quantization_config in config.json is damaged: 'widths' must map the number of "
                "each MoE layer to the widths of its experts"
                + (f", and {sorted(unknown)} are not known" if unknown else "")
                + ": export again"
            )
        self.widths: dict[str, list[int]] = widths
        self.quant_method, self.format = quant_method, format
        self.quantum, self.pruned = quantum, pruned


def _are_widths(found: Any) -> bool:
    return isinstance(found, list) and all(type(w) is int and w >= 0 for w in found)


@register_quantizer("flexmoe")
class FlexmoeQuantizer(HfQuantizer):
    """Gives the model ragged experts before its weights are read, and the converters for them."""

    requires_calibration = True  # transformers: only loads what is in this form already
    quantization_config: FlexmoeConfig

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        layers, widths = expert_layers(model), self.quantization_config.widths
        if {str(layer.index) for layer in layers} != set(widths):
            raise FlexmoeError(
                f"config.json has widths for the layers {sorted(widths)}, the model has "
                f"experts in {[layer.index for layer in layers]}: export again"
            )
        self.leaves = {re.sub(r".*?\.\d+\.", "", layer.name) for layer in layers}
        self.parameters = [f"{layer.name}.{p}" for layer in layers for p in layer.parameters]
        for layer in layers:
            make_ragged(layer, widths[str(layer.index)])
        constant = self.quantization_config.format == WITH_CONSTANTS
        if constant:
            check_constants([layer.index for layer in layers], checkpoint_files or [])
            # not above: transformers may load this plug-in while that file imports transformers
            from flexmoe.routing.edits import EDITED, Work

            for layer in layers:
                constant_EH = torch.empty(layer.E, layer.H, dtype=torch.float32, device="meta")
                layer.module.register_buffer(CONSTANT, constant_EH)
                layer.module.flexmoe_work = Work(layer.I)
            model._keep_in_fp32_modules_strict.add(CONSTANT)
            model.set_experts_implementation(EDITED)
        else:
            model.set_experts_implementation("flexmoe")

    def update_weight_conversions(
        self, weight_conversions: list[WeightTransform], model: PreTrainedModel
    ) -> list[WeightTransform]:
        """Converters that stack tensors of single experts stack them ragged; where there is none,
        one with our own names takes the place of what reads a tensor of all experts. That tensor
        is there too, but empty: it makes engines without flexmoe refuse the export."""
        kept, served = [], set()
        stock_names: dict[str, str] = {}
        for transform in weight_conversions:
            if not isinstance(transform, WeightConverter):
                kept.append(transform)
                continue
            names = [p for p in self.parameters if p.endswith(transform.target_patterns[0])]
            if not names:
                kept.append(transform)
            elif all("*" in pattern for pattern in transform._original_source_patterns):
                kept.append(_ragged_converter(transform, names[0].rpartition(".")[2]))
                served |= {name.rpartition(".")[2] for name in names}
            else:
                pattern = transform._original_source_patterns[0]
                stock_names[names[0].rpartition(".")[2]] = f".{pattern.removeprefix('.')}"
        for leaf in sorted(self.leaves):
            for name, sides in SIDES_OF.items():
                exists = any(p.endswith(f"{leaf}.{name}") for p in self.parameters)
                if exists and name not in served:
                    patterns = [f".{leaf}.*.{LEAVES[side]}" for side in sides]
                    patterns.append(stock_names.get(name, f".{leaf}.{name}"))
                    operations = [RaggedMerge(name)]
                    kept.append(WeightConverter(patterns, f".{leaf}.{name}", operations))
        return kept

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def check_constants(layers: list[int], files: list[str]) -> None:
    """`FlexmoeError` unless the safetensors ``files`` have the constants of all ``layers``:
    transformers would go on with whatever stands in memory."""
    found = set()
    for file in files:
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.endswith(CONSTANT)]
        found |= {int(n[1]) for n in (re.search(r"\.(\d+)\.", name) for name in names) if n}
    if files and (lost := [i for i in layers if i not in found]):
        raise FlexmoeError(
            f"config.json says that constants stand for experts (format {WITH_CONSTANTS}), and the "
            f"weights have none ({CONSTANT}) for {len(lost)} of {len(layers)} layers (first: layer "
            f"{lost[0]}): a file is missing or of another export, copy it again or export again"
        )


def make_ragged(layer: ExpertLayer, width_E: list[int]) -> None:
    """Replace the parameters of an experts module on the meta device by ragged ones and attach
    ``flexmoe_offset_E`` (first row of each expert, and their total) and ``flexmoe_width_E``."""
    if len(width_E) != layer.E or max(width_E, default=0) > layer.I:
        raise FlexmoeError(
            f"config.json has {len(width_E)} widths up to {max(width_E, default=0)} for layer "
            f"{layer.index}, which has {layer.E} experts of {layer.I} channels: export again"
        )
    offset_E = [0]
    for w in width_E:
        offset_E.append(offset_E[-1] + w)
    for name, stock in layer.parameters.items():
        sides = (2,) if name.startswith("gate_up") else ()
        hidden = () if name.endswith("bias") else (layer.H,)
        shape = (offset_E[-1], *sides, *hidden)
        ragged = torch.empty(shape, dtype=stock.dtype, device=stock.device)
        setattr(layer.module, name, nn.Parameter(ragged, requires_grad=stock.requires_grad))
    layer.module.flexmoe_offset_E, layer.module.flexmoe_width_E = offset_E, list(width_E)


def _ragged_converter(stock: WeightConverter, parameter: str) -> WeightConverter:
    sources, targets = stock._original_source_patterns, stock._original_target_patterns
    return stock.copy(sources, targets, operations=[RaggedMerge(parameter)])


class RaggedMerge(ConversionOps):
    """Tensors of single experts, one list for each side in the order of the source patterns
    ([w, H], down [H, w], biases [w]), to one ragged parameter ([S, 2, H], [S, H], [S, 2], [S]).
    A source pattern without ``*`` is that of the empty tensor under the stock name."""

    def __init__(self, parameter: str):
        self.parameter = parameter

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        config: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        sides = [input_dict.pop(pattern) for pattern in source_patterns if "*" in pattern]
        if self.parameter == "down_proj":
            sides = [[tensor.mT for tensor in side] for side in sides]
        width_E = _widths(config, full_layer_name)
        for side in sides:
            if (found := [len(tensor) for tensor in side]) != width_E:
                raise FlexmoeError(
                    f"{full_layer_name}: the experts have widths {found}, config.json says "
                    f"{width_E}: export again"
                )
        merged = [torch.cat(side) for side in sides]
        two_sided = self.parameter.startswith("gate_up")
        return {target_patterns[0]: torch.stack(merged, 1) if two_sided else merged[0]}

    @property
    def reverse_op(self) -> ConversionOps:
        return RaggedSplit(self.parameter)


class RaggedSplit(ConversionOps):
    """The reverse of `RaggedMerge`."""

    def __init__(self, parameter: str):
        self.parameter = parameter

    @torch.no_grad()
    def convert(
        self,
        input_dict: dict[str, list[Tensor]],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        config: Any = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        (stored,) = input_dict.values()
        ragged = stored[0] if isinstance(stored, list) else stored
        sides = ragged.unbind(1) if self.parameter.startswith("gate_up") else (ragged,)
        single = [pattern for pattern in target_patterns if "*" in pattern]
        split = {}
        for pattern, side in zip(single, sides, strict=True):
            for e, tensor in enumerate(side.split(_widths(config, full_layer_name))):
                tensor = tensor.mT if self.parameter == "down_proj" else tensor
                split[pattern.replace("*", str(e))] = tensor.contiguous()
        return split | {p: ragged.new_empty(0) for p in target_patterns if p not in single}

    @property
    def reverse_op(self) -> ConversionOps:
        return RaggedMerge(self.parameter)


def _widths(config: Any, name: str) -> list[int]:
    number = re.search(r"\.(\d+)\.", name)
    if number is None:
        raise FlexmoeError(f"'{name}' does not stand in a numbered layer")
    return config.quantization_config.widths[number[1]]
