"""One width for all experts, and the config key that sets it.

The key is found by trying: models without weights are built from config.json with one number
changed, and the shapes say what that number sets.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flexmoe.checkpoint import Checkpoint, meta_model, read_config
from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers
from flexmoe.plan import Plan
from flexmoe.settings import Place, places, with_value
from flexmoe.widths import coupled_reason, nearest_width


def uniform_width(plan: Plan, pruned: float) -> int:
    """The multiple of the plan's quantum (and of `ALIGNED`) nearest to ``1 - pruned`` of the
    channels, at least one and at most all."""
    if plan.recipe.unit == "expert":
        raise FlexmoeError(
            f"one width for all cuts channels, but '{plan.recipe.method}' ranked whole experts"
        )
    channels = {record.channels for record in plan.layers.values()}
    if len(channels) > 1:
        raise FlexmoeError(
            f"the layers' experts have different widths ({sorted(channels)}), which no single "
            "config value can set: use the layouts ragged or masked"
        )
    if not 0.0 <= pruned < 1.0:
        raise FlexmoeError(f"pruned must be at least 0 and less than 1, found {pruned:g}")
    return nearest_width(channels.pop(), plan.quantum, pruned)


def takes_one_width(folder: Path, plan: Plan, pruned: float) -> bool:
    """Whether the member at ``pruned`` of a plan of channels, of the checkpoint in ``folder``, can
    be written with one width for all experts."""
    try:
        layers = expert_layers(meta_model(folder))
        uniform_config(Checkpoint(folder), layers, uniform_width(plan, pruned))
    except FlexmoeError:
        return False
    return True


def uniform_config(
    checkpoint: Checkpoint, layers: Sequence[ExpertLayer], width: int
) -> dict[str, Any]:
    """config.json with the experts' width set to ``width`` and nothing else changed. Raises
    `FlexmoeError` if no value does that, naming the other tensors it would change."""
    full = layers[0].I
    config = read_config(checkpoint.path)
    before = _shapes(checkpoint, config)
    experts = {f"{layer.name}.{name}" for layer in layers for name in layer.parameters}
    trial = width if width != full else max(1, full // 2)
    coupled: dict[Place, set[str]] = {}
    for path in sorted(places(config, full), key=lambda path: "intermediate" not in path[-1]):
        try:
            after = _shapes(checkpoint, with_value(config, path, trial))
        except FlexmoeError:
            continue  # a model that cannot be built like that: another number than the width
        changed = {name for name in before if before[name] != after.get(name)}
        if changed == experts:
            return with_value(checkpoint.config, path, width)
        if changed >= experts:
            coupled[path] = changed - experts
    if not coupled:
        raise FlexmoeError(
            f"no value in {checkpoint.path / 'config.json'} sets the width {full} of the experts: "
            "use the layouts ragged or masked"
        )
    path, others = min(coupled.items(), key=lambda item: len(item[1]))
    kinds = sorted({re.sub(r"\.\d+\.", ".N.", name) for name in others})
    raise FlexmoeError(coupled_reason(path, kinds))


def _shapes(checkpoint: Checkpoint, config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    model = meta_model(checkpoint.path, config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
