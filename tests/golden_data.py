"""Small random models and what the official code of published methods computed on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexmoe.methods import Text, all_methods, score_model
from flexmoe.observe import observe
from flexmoe.statistics import STATISTICS, Statistics, statistic

GOLDEN = Path(__file__).parent / "golden"


def golden_model(name: str) -> tuple[PreTrainedModel, Tensor]:
    """Model and calibration tokens [16, 32]."""
    model = AutoModelForCausalLM.from_pretrained(
        GOLDEN / "models" / name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    return model, load_file(GOLDEN / "tokens" / f"{name}.safetensors")["input_ids"]


def golden(model_name: str, score_name: str) -> tuple[PreTrainedModel, Tensor, dict[str, Tensor]]:
    """Model, calibration tokens [16, 32] and the official numbers of a method."""
    model, ids = golden_model(model_name)
    return model, ids, load_file(GOLDEN / "scores" / f"{score_name}.{model_name}.safetensors")


def golden_logits(name: str) -> Tensor:
    """Logits [16, 32, V] that the official code gave after pruning, or had before (unpruned)."""
    return load_file(GOLDEN / "logits" / f"{name}.safetensors")["logits"]


def scores(model: PreTrainedModel, ids: Tensor, name: str) -> tuple[dict[int, Tensor], Statistics]:
    """A method's scores by layer, and the statistics they come from."""
    method = all_methods()[name]
    statistics = observe(model, ids, method.needs, batch_size=4)
    return score_model(method, model, statistics, Text(ids, batch_size=4)), statistics


def observed(
    model: PreTrainedModel, ids: Tensor, look: Callable, *others: str, reads: tuple[str, ...] = ()
) -> Statistics:
    """What a pass finds for a statistic of the test's own, ``look_E``, and for others."""
    statistic("look_E", when="forward", reads=reads)(look)
    try:
        return observe(model, ids, ("look_E", *others), batch_size=4)
    finally:
        STATISTICS.pop("look_E")


def relative(got: Tensor, want: Tensor) -> float:
    """Largest relative difference."""
    return float(((got - want).abs() / want.abs().clamp_min(1e-30)).max().detach())
