"""A second checkpoint beside the model, for methods that compare the two: only its routers are
read, one tensor at a time."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from flexmoe.checkpoint import Checkpoint
from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer
from flexmoe.headers import resolve
from flexmoe.methods import Method
from flexmoe.statistics import Statistics

ROUTER = "reference_router_EH"  # where its matrices stand among a layer's statistics


def check_reference(methods: Sequence[Method], reference: str | Path | None) -> None:
    """`FlexmoeError` unless a second checkpoint is given just when a method looks at one."""
    looking = [method.name for method in methods if method.reference]
    if looking and reference is None:
        raise FlexmoeError(
            f"method '{looking[0]}' compares with a second checkpoint: give it with --reference, "
            "such as the model before it was fine-tuned"
        )
    if reference is not None and not looking:
        names = ", ".join(method.name for method in methods)
        raise FlexmoeError(f"reference has no effect: {names} looks at one checkpoint only")


def add_reference(
    statistics: Statistics, layers: Sequence[ExpertLayer], reference: str | Path
) -> None:
    """Put the router matrices [E, H] of the checkpoint ``reference`` beside the statistics. They
    are known by their layer's number, a row for each expert and what they are called."""
    checkpoint = Checkpoint(resolve(reference))
    for layer in layers:
        found = [
            name
            for name, info in checkpoint.tensors.items()
            if f".{layer.index}." in name
            and len(info.shape) == 2
            and info.shape[0] == layer.E
            and name.endswith(".weight")
            and any(word in name for word in ("gate.", "router."))
        ]
        if len(found) != 1:
            raise FlexmoeError(
                f"'{reference}', layer {layer.index}: expected one router with {layer.E} rows, "
                f"found {', '.join(sorted(found)) or 'none'}: it must be of the same architecture"
            )
        statistics[layer.index].values[ROUTER] = checkpoint.tensor(found[0]).double()
