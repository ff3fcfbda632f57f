"""Patterns of tasks that nobody profiled: random scores of a checkpoint's experts."""

from __future__ import annotations

from pathlib import Path

import torch

from flexmoe.checkpoint import Checkpoint
from flexmoe.experts import expert_layers
from flexmoe.family import load_stock
from flexmoe.plan import LayerRecord
from flexmoe.premoe import Pattern
from flexmoe.premoe.pattern import Reach
from flexmoe.premoe.store import fingerprint_of
from test_plan import RECIPE
from zoo import tiny_model

# an expert a tensor; all experts in one, with biases that stay; dense layers before the first MoE
FORMS = ("qwen3_moe", "gpt_oss", "nemotron_h")


def made_pattern(task: str, folder: Path, seed: int = 0) -> Pattern:
    """A pattern with random scores of the checkpoint in ``folder``."""
    checkpoint, model = Checkpoint(folder), load_stock(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    layers = expert_layers(model)
    scores = {x.index: torch.rand(x.E, generator=generator, dtype=torch.float64) for x in layers}
    made_of = {"weights_sha256": fingerprint_of(folder), "unit": "expert", "method": "peu"}
    about = {"base_model": str(folder), "model_type": model.config.model_type, "data": task}
    return Pattern(
        task=task,
        score=scores,
        signature_E=scores[layers[0].index].clone(),
        reach=(
            Reach(tokens=16, prompts=20, distance=2.0),
            Reach(tokens=64, prompts=20, distance=1),
        ),
        spread={n: torch.eye(layers[0].E, dtype=torch.float64) for n in (16, 64)},
        recipe=RECIPE.model_copy(update=made_of | about),
        layers={x.index: LayerRecord(**vars(x.shape), experts_per_token=2) for x in layers},
        bytes_full=checkpoint.bytes,
        bytes_per_parameter=4,
    )


def saved(name: str, folder: Path, tasks: tuple[str, ...] = ("a", "b")) -> tuple[Path, Path]:
    """A random model's checkpoint, and a store with made-up patterns of it."""
    source, store = folder / "model", folder / "store"
    tiny_model(name).save_pretrained(source)
    store.mkdir()
    for seed, task in enumerate(tasks):
        made_pattern(task, source, seed).save(store)
    return source, store
