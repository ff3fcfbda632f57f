"""A model of which one decoder layer at a time is in memory.

What stands outside the decoder layers (embeddings, last norm, head, towers) is read once and
stays. A layer's weights are read when they are needed and dropped afterwards: experts go one by
one to the place where `trace` says their channels are, all else goes through transformers' own
converter. What is not in memory is on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig

from flexmoe.checkpoint import Checkpoint, dtype_of, meta_model
from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers
from flexmoe.family import check_finite
from flexmoe.hf import SIDES_OF
from flexmoe.memory import give_back
from flexmoe.names import names_by_parameter
from flexmoe.trace import TracedLayer, trace


class LayerLoader:
    """``model`` is the stock model in eval mode, frozen; ``layers`` are its decoder layers, empty
    but for those that are `resident`; ``experts`` its MoE layers by number. ``bytes_outside`` and
    ``bytes_of`` each layer say what weights take in memory.

    A context manager: what stands outside the decoder layers is there inside the block.
    ``dtype`` None is the one that config.json names, or else that of the weights. Raises
    `FlexmoeError` for a model without one list of decoder layers and for weights that are missing,
    NaN or infinite.
    """

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype | None = None):
        self.checkpoint, self.device = Checkpoint(path), device
        self.model = meta_model(path, dtype=dtype).eval()
        if dtype is None and self.model.config.dtype is None:
            self.model = meta_model(path, dtype=_stored_dtype(self.checkpoint)).eval()
        for config in (self.model.config, self.model.config.get_text_config()):
            if getattr(config, "output_router_logits", False):  # left from training: what the
                config.output_router_logits = False  # routers of all layers say, none reads it
        self.dtype = dtype or self.model.dtype
        self.traced = trace(self.checkpoint, self.model)
        self.experts = {layer.index: layer for layer in expert_layers(self.model)}
        self.stack = _stack(self.experts.values())
        self.layers = list(self.model.get_submodule(self.stack).children())
        self.conversions = get_model_conversion_mapping(self.model)
        self.names = self._names_by_layer()
        self.sound = set[int]()  # layers whose values are known to be finite
        self.empty = self.model.state_dict(keep_vars=True)
        self.bytes_of = [_bytes(layer.state_dict(keep_vars=True)) for layer in self.layers]
        self.bytes_outside = _bytes(self.empty) - sum(self.bytes_of)
        for name, buffer in self.model.named_non_persistent_buffers():  # rotary tables and such
            _put(self.model, name, torch.empty_like(buffer, device=device))
        self.model.initialize_weights()  # fills those; on the meta device nothing happens

    def __enter__(self) -> LayerLoader:
        there = self._convert(self.names[None])
        self.model.tie_weights(missing_keys=self.empty.keys() - there, recompute_mapping=False)
        self._check_complete("", self.model, f"{self.stack}.")
        self.model.requires_grad_(False)
        return self

    def __exit__(self, *error: object) -> None:
        for name, tensor in self.empty.items():
            _put(self.model, name, tensor)

    @contextmanager
    def resident(self, index: int, experts: bool = True) -> Iterator[nn.Module]:
        """Decoder layer ``index`` with its weights inside the block, frozen; with ``experts`` false
        those of its routed experts are not read."""
        layer = self.layers[index]
        empty = layer.state_dict(keep_vars=True)
        try:
            self._convert(self.names[index])
            but = None
            if index in self.traced and experts:
                self._read_experts(self.experts[index], self.traced[index])
            elif index in self.traced:
                but = f"{self.experts[index].name}."
            self._check_complete(f"{self.stack}.{index}.", layer, but)
            if but is None and index not in self.sound:
                check_finite(layer, f"{self.stack}.{index}")
                self.sound.add(index)
            yield layer.requires_grad_(False)
        finally:
            for name, tensor in empty.items():
                _put(layer, name, tensor)
            give_back()

    def _names_by_layer(self) -> dict[int | None, list[str]]:
        """The checkpoint's tensors but those of experts, by decoder layer (None: outside)."""
        experts = {piece.name for traced in self.traced.values() for piece in traced.stored}
        names: dict[int | None, list[str]] = {i: [] for i in (None, *range(len(self.layers)))}
        for parameter, stored in names_by_parameter(self.checkpoint, self.model).items():
            number = re.match(rf"{re.escape(self.stack)}\.(\d+)\.", parameter)
            place = int(number[1]) if number else None
            names[place] += [name for name in stored if name not in experts]
        return names

    def _convert(self, names: list[str]) -> set[str]:
        """Read these tensors into the parameters and buffers that they are; returns whose."""
        info, _ = convert_and_load_state_dict_in_model(
            self.model,
            {name: _Stored(self.checkpoint, name) for name in names},
            LoadStateDictConfig(
                # "disk", on which nothing is: then transformers reads without threads, each of
                # which would keep memory of its own
                device_map={"": self.device, "nothing": "disk"},
                dtype=self.dtype,
                dtype_plan=self.model._get_dtype_plan(self.dtype),
                weight_mapping=self.conversions,
            ),
        )
        return self.model.state_dict().keys() - info.missing_keys

    def _read_experts(self, layer: ExpertLayer, traced: TracedLayer) -> None:
        """Expert by expert, so that beside the layer no more than one is in memory."""
        views: dict[str, Tensor] = {}
        biases = ["down_proj_bias"] if layer.module.has_bias else []
        for name in (*layer.parameters, *biases):
            like = getattr(layer.module, name)
            value = torch.empty(like.shape, dtype=like.dtype, device=self.device)
            _put(layer.module, name, value)
            if name in biases:
                views["down_bias"] = value
            else:
                views |= zip(SIDES_OF[name], layer.channel_major(name, value), strict=True)
        for e in range(layer.E):
            for side, tensor in traced.expert(self.checkpoint, e).items():
                views[side][e].copy_(tensor)

    def _check_complete(self, prefix: str, module: nn.Module, but: str | None) -> None:
        """`FlexmoeError` if there is no weight for something in ``module``, whose names begin with
        ``prefix``; for those that begin with ``but`` none is expected."""
        for name, tensor in module.state_dict().items():
            expected = but is None or not f"{prefix}{name}".startswith(but)
            if tensor.is_meta and expected:
                raise FlexmoeError(
                    f"the checkpoint in {self.checkpoint.path} has nothing of the right shape for "
                    f"{prefix}{name} {list(tensor.shape)}: files are missing, or config.json "
                    "belongs to another model"
                )


def _stored_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """That of the first numbers in the files, which transformers takes for that of all."""
    found = (dtype_of(name, info.dtype) for name, info in checkpoint.tensors.items())
    return next((dtype for dtype in found if dtype.is_floating_point), None)


class _Stored:
    """A tensor of a checkpoint that is read when transformers slices it."""

    def __init__(self, checkpoint: Checkpoint, name: str):
        self.checkpoint, self.name = checkpoint, name

    def __getitem__(self, everything: Any) -> Tensor:
        return self.checkpoint.tensor(self.name)


def _bytes(state: Mapping[str, Tensor]) -> int:
    """What a state takes, tied weights once."""
    return sum(t.nbytes for t in {id(t): t for t in state.values()}.values())


def _stack(layers: Iterable[ExpertLayer]) -> str:
    """Name of the one list of decoder layers in which all experts stand."""
    stacks = sorted({re.split(r"\.\d+\.", layer.name)[0] for layer in layers})
    if len(stacks) > 1:
        raise FlexmoeError(
            f"the model has experts in several lists of layers ({', '.join(stacks)}): it cannot be "
            "read layer by layer. Leave out --memory"
        )
    return stacks[0]


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Replace a parameter or buffer of ``module``, given by its dotted name."""
    place, _, leaf = name.rpartition(".")
    owner = module.get_submodule(place)
    if leaf in owner._parameters and not isinstance(tensor, nn.Parameter):
        tensor = nn.Parameter(tensor, requires_grad=False)
    setattr(owner, leaf, tensor)
