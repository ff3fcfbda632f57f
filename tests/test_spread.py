"""Models that are not on the first GPU, or not all in one place: on several of them, or on disk."""

from types import SimpleNamespace

import torch

from flexmoe import progress
from flexmoe.experts import expert_layers
from flexmoe.routing import rules
from flexmoe.routing.edits import Routed
from flexmoe.serve import transformers_batch as batching
from flexmoe.serve import transformers_engine
from zoo import tiny_model


def test_a_layer_need_not_be_where_the_model_begins():
    edit = rules._numbers(torch.tensor([0, 2]))
    index_TK = torch.zeros(5, 2, dtype=torch.long, device="meta")  # a device like any other
    moved = edit(Routed(index_TK, index_TK, 3))
    assert moved.index_TK.device == index_TK.device


def test_constants_of_a_layer_on_disk_are_in_memory():
    model = tiny_model("olmoe")
    layers = expert_layers(model)
    layers[0].module.to("meta")
    width = {layer.index: torch.zeros(layer.E) for layer in layers}
    constant = {layer.index: torch.ones(layer.E, layer.H) for layer in layers}
    rules.reroute(model, "constant", width, constant)
    for layer in layers:
        assert torch.equal(layer.module.flexmoe_constant_EH, constant[layer.index])


def test_progress_counts_the_memory_of_every_gpu(monkeypatch):
    held = {None: 0, 0: 0, 1: 3 * 2**30}  # asked without a device: the current one, which is cuda:0
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: held[device])
    assert progress._use([], 0, 0.0) == "3.0 GiB on CUDA"


def test_the_cache_of_a_server_is_sized_by_the_gpu_of_its_model(monkeypatch):
    """transformers asks how much memory the current one has."""
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(batching, "try_out", lambda *a: None)
    monkeypatch.setattr(batching, "start", lambda *a: tuple(current))
    monkeypatch.setattr(transformers_engine, "GenerationConfig", lambda **more: None)
    generation = SimpleNamespace(eos_token_id=0, pad_token_id=0)
    settings = SimpleNamespace(kv_tokens=None, budgets=SimpleNamespace(rows=("0",)))
    for where in ("cuda:1", "cpu"):
        model = SimpleNamespace(device=torch.device(where), generation_config=generation)
        found = transformers_engine.start_batching(model, settings)
        assert found == (torch.device("cuda:1"),)  # which the second leaves alone
