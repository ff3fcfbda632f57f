"""Models whose layers are not all in one place: on several GPUs, or on disk."""

import torch

from flexmoe import progress
from flexmoe.experts import expert_layers
from flexmoe.routing import rules
from flexmoe.routing.edits import Routed
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
