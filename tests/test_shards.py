"""Shards where an index says they are, with weights that are replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from flexmoe.checkpoint import Checkpoint
from flexmoe.errors import FlexmoeError
from flexmoe.exporter import rank_checkpoint
from flexmoe.headers import INDEX_NAME, resolve
from flexmoe.shards import Source, replaced
from helpers import ids_of, load, logits, random_plan
from zoo import tiny_model


def in_subfolders(source: Path, folder: str) -> None:
    """Let the index of ``source`` name its shards in ``folder``; they are moved into parts/a."""
    index = json.loads((source / INDEX_NAME).read_text())
    (source / "parts" / "a").mkdir(parents=True, exist_ok=True)
    for shard in source.glob("*.safetensors"):
        shard.rename(source / "parts" / "a" / shard.name)
    index["weight_map"] = {k: f"{folder}/{Path(v).name}" for k, v in index["weight_map"].items()}
    (source / INDEX_NAME).write_text(json.dumps(index))


def test_shards_in_subfolders_stay_there(tmp_path: Path) -> None:
    model, source, family = tiny_model("mixtral"), tmp_path / "source", tmp_path / "family"
    model.save_pretrained(source, max_shard_size="50KB")
    plan = random_plan(model, source)
    (tmp_path / "flat").mkdir()
    rank_checkpoint(source, plan, tmp_path / "flat")
    in_subfolders(source, "parts/a")
    family.mkdir()
    rank_checkpoint(resolve(source), plan, family)
    ranked = [logits(load(folder, model), ids_of(model)) for folder in (tmp_path / "flat", family)]
    assert torch.equal(*ranked)
    assert not list(family.glob("*.safetensors")) and list(family.glob("parts/a/*.safetensors"))


def test_shards_outside_of_the_folder_are_refused(tmp_path: Path) -> None:
    """What is made of the checkpoint would be written outside of its folder too."""
    source = tmp_path / "source"
    tiny_model("mixtral").save_pretrained(source, max_shard_size="50KB")
    for folder in ("../source/parts/a", str(source / "parts" / "a")):
        in_subfolders(source, folder)
        with pytest.raises(FlexmoeError, match="outside of its folder"):
            Checkpoint(source)


def test_parameters_that_the_checkpoint_does_not_store_one_to_one_are_refused(
    tmp_path: Path,
) -> None:
    model = tiny_model("mixtral")
    model.save_pretrained(tmp_path)
    source = Source.open(tmp_path, random_plan(model, tmp_path))
    gates = [layer.mlp.gate.weight.detach() + 1 for layer in model.model.layers]
    new = {f"model.layers.{i}.mlp.gate.weight": gate for i, gate in enumerate(gates)}
    made = {e.name: e.make for shard in replaced(source, new).values() for e in shard}
    for i, gate in enumerate(gates):
        assert torch.equal(made[f"model.layers.{i}.block_sparse_moe.gate.weight"](), gate)
    with pytest.raises(FlexmoeError, match="stores mine in a form that cannot be rewritten"):
        replaced(source, new | {"mine": gates[0] + 1})
