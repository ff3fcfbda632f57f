"""One decoder layer of a model, run by the model's own forward pass.

The layers before it give what is stored instead of computing, the pass ends with the layer. So it
gets what the model would give it (positions, masks, embeddings of its own) without anything here
knowing the architecture. Only the output of the layer just before is there: the others give NaN,
and a model where these count is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flexmoe.errors import FlexmoeError
from flexmoe.streamed.activations import Output, check_output, same_form, tensors_of
from flexmoe.streamed.layer_loader import LayerLoader


def run_layer(
    loader: LayerLoader, index: int, given: Output | None, ids: Tensor, **settings: Any
) -> Any:
    """What decoder layer ``index`` gives for windows ``ids`` [n, t] if the layer before it gave
    ``given``; for an index beyond the last layer what the model gives."""
    before = None if given is None else _nothing(given)
    try:
        output = _forward(loader, index, given, before, ids, **settings)
    except LookupError as error:
        if index == 0:
            raise
        raise _depends(loader, index, f"it looks for {error} and finds nothing") from error
    if index == len(loader.layers):
        return output
    output = check_output(output, f"decoder layer {index}")
    for tensor in tensors_of(output):
        if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
            raise not_finite(loader, index, given, ids)
    return output


def _forward(
    loader: LayerLoader,
    index: int,
    given: Output | None,
    before: Output | None,
    ids: Tensor,
    **settings: Any,
) -> Any:
    """The model's own forward pass up to layer ``index``, or to its end. The layers before
    give ``before``, the one just before ``given``."""
    layers = loader.layers
    for j, layer in enumerate(layers[:index]):
        layer.forward = _giving(given if j == index - 1 else before)
    if index < len(layers):
        layers[index].forward = _ending(layers[index].forward)
    try:
        return loader.model(input_ids=ids, use_cache=False, **settings)
    except _End as end:
        return end.output
    finally:
        for layer in layers[: index + 1]:
            del layer.forward


def not_finite(loader: LayerLoader, index: int, given: Output | None, ids: Tensor) -> FlexmoeError:
    """Why what layer ``index`` (or the model) gives is not finite."""
    if given is not None:
        with torch.no_grad():
            again = _forward(loader, index, given, given, ids)
        again = again.logits if index == len(loader.layers) else tensors_of(again)[0]
        if torch.isfinite(again).all():
            return _depends(loader, index, "it uses what layers before that one gave")
    return FlexmoeError(
        f"what decoder layer {min(index, len(loader.layers) - 1)} gives on the calibration "
        "data is not finite: check that the tokenizer belongs to the model and that its "
        "weights have no NaN"
    )


def _depends(loader: LayerLoader, index: int, reason: str) -> FlexmoeError:
    last = len(loader.layers)
    who = f"decoder layer {index}" if index < last else "the end of the model"
    return FlexmoeError(
        f"{type(loader.model).__name__} cannot be read layer by layer: {who} needs more "
        f"than the output of the layer before it ({reason}). Leave out --memory"
    )


class _End(Exception):
    """Ends a forward pass with the output that was wanted."""

    def __init__(self, output: Any):
        super().__init__()
        self.output = output


def _giving(output: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: output


def _ending(forward: Callable[..., Any]) -> Callable[..., Any]:
    def ending(*args: Any, **kwargs: Any) -> Any:
        raise _End(forward(*args, **kwargs))

    return ending


def _nothing(output: Output) -> Output:
    """NaN in the form of ``output``, without memory."""
    parts = []
    for part in tensors_of(output):
        if part is not None and part.is_floating_point():
            part = torch.full((), torch.nan, dtype=part.dtype, device=part.device).expand_as(part)
        parts.append(part)
    return same_form(output, parts)
