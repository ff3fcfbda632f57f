"""Smaller pieces instead of an out-of-memory death, in every pass over text, with equal results."""

import math
from types import SimpleNamespace

import psutil
import pytest
import torch

import flexmoe.ram
import zoo
from flexmoe.checkpoint import Checkpoint
from flexmoe.data import TINY
from flexmoe.evaluation.members import fit_together
from flexmoe.experts import expert_layers
from flexmoe.learn import LearnConfig, learn_positions
from flexmoe.memory import MicroBatch, MostHeld, gib, held, out_of_memory
from flexmoe.observe import observe

CPU = torch.device("cpu")
# Sums of the same float32 numbers, grouped otherwise.
TOLERANCE = 1e-4


def ids(number=8):
    return torch.randint(3, 60, (number, 12), generator=torch.Generator().manual_seed(0))


class Short:
    """A model that runs out of memory for more than ``most`` windows, after it has computed."""

    def __init__(self, model, most):
        self.forward, self.most, self.sizes = model.forward, most, []

    def __call__(self, input_ids, **settings):
        found = self.forward(input_ids=input_ids, **settings)
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return found


def test_the_size_is_halved_for_good_and_a_small_batch_changes_nothing():
    micro, tried = MicroBatch(8), []

    def work(size):
        tried.append(size)
        if size > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return size

    assert micro.run(work, 1) == 1 and micro.size == 8
    assert micro.run(work, 6) == 1  # 6 and 3 are too many
    assert micro.run(work, 6) == 1 and tried == [1, 6, 3, 1, 1]


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), MemoryError()])
def test_other_errors_and_single_windows_are_not_tried_again(error):
    def work(size):
        raise error

    with pytest.raises(type(error)):
        MicroBatch(1 if out_of_memory(error) else 8).run(work, 8)


def test_observe_goes_on_with_smaller_parts():
    model = zoo.tiny_model("qwen3_moe")
    names = ["fisher_EI", "energy_sum_EI", "energy_max_EI"]
    want = observe(model, ids(), names, batch_size=4)
    model.forward = short = Short(model, 2)
    got = observe(model, ids(), names, batch_size=4)
    assert short.sizes == [4, 2, 2, 2, 2]
    for i, stats in want.items():
        assert torch.equal(got[i]["count_E"], stats["count_E"])  # nothing is counted twice
        assert (got[i].tokens, got[i].batches) == (stats.tokens, stats.batches)
        for name in names:
            assert torch.allclose(got[i][name], stats[name], rtol=TOLERANCE, atol=1e-9), name


@pytest.mark.parametrize("name", ["taylor_EI", "subset_loss_C"])
def test_what_looks_at_whole_batches_does_not_split_them(name):
    model = zoo.tiny_model("qwen3_moe")
    model.forward = Short(model, 2)
    with pytest.raises(torch.OutOfMemoryError):
        observe(model, ids(), [name], batch_size=4)


def test_learning_goes_on_with_smaller_parts():
    model = zoo.tiny_model("qwen3_moe")
    generator = torch.Generator().manual_seed(0)
    layers = expert_layers(model)
    score = {x.index: torch.rand(x.E, x.I, generator=generator).double() for x in layers}
    config = LearnConfig(steps=2)
    want = learn_positions(model, ids(), score, config, batch_size=4)
    model.forward = short = Short(model, 1)
    got = learn_positions(model, ids(), score, config, batch_size=4)
    assert short.sizes[:2] == [2, 1] and set(short.sizes[1:]) == {1}
    for i in want:
        assert torch.allclose(got[i], want[i], atol=1e-2)
        assert float((got[i] - want[i]).abs().mean()) < 1e-3


def test_the_most_that_is_held_is_seen_when_it_is_gone():
    with MostHeld(CPU) as most:
        before = held(CPU)
        block = torch.ones(2**25)  # 128 MiB
        for _ in range(20):
            block.mul_(1.0)
        del block
    assert 100 * 2**20 < most.bytes - before < 200 * 2**20
    assert gib(2**29) == "512 MiB" and gib(1.5 * 2**30) == "1.50 GiB"


@pytest.fixture
def container(monkeypatch, tmp_path):
    """Of a machine with room for everything, a container that holds 700 bytes, 300 of files."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**15))
    monkeypatch.setattr(flexmoe.ram, "GROUP", tmp_path)
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 100\n")
    return tmp_path / "memory.max"


@pytest.mark.parametrize(("most", "free"), [("1000\n", 500), ("max\n", 10**15)])
def test_a_container_has_what_it_may_and_the_files_it_can_drop(container, most, free):
    container.write_text(most)
    assert flexmoe.ram.free_ram() == free


def test_models_that_the_container_has_no_room_for_are_not_loaded_together(container):
    model = TINY / "model"
    assert fit_together((model, model), "cpu")
    weights = 4 * sum(math.prod(of.shape) for of in Checkpoint(model).tensors.values())
    container.write_text(str(500 + int(2 * weights)))
    assert fit_together((model,), "cpu") and not fit_together((model, model), "cpu")
