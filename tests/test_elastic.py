"""Released channels: the memory is gone, poorer budgets are the same, richer ones come back."""

import subprocess
import sys
import threading
from copy import deepcopy
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from transformers import OlmoeForCausalLM

import flexmoe
from flexmoe import elastic, experts, storage
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.exporter import write_family
from flexmoe.observe import observe
from flexmoe.storage import stored_weights
from helpers import LOGIT_TOLERANCE, difference, expert_bytes, ids_of, logits, random_plan
from zoo import tiny_model

# hub experts one by one and in one tensor with biases (transposed), without gate
NAMES = ["olmoe", "gpt_oss", "nemotron_h"]


@pytest.fixture(params=NAMES)
def opened(request, tmp_path):
    """The same family opened twice: to release, and to compare with."""
    model = tiny_model(request.param)
    model.save_pretrained(tmp_path / "base")
    plan = random_plan(model, tmp_path / "base")
    if request.param == "olmoe":
        write_family(tmp_path / "base", plan, tmp_path / "family")
    else:  # a plan alone, on the base model
        plan.save(tmp_path / "family")
    return [flexmoe.load(tmp_path / "family", device="cpu", dtype=torch.float32) for _ in range(2)]


def test_copies_and_models_of_another_dtype_compute_with_their_own_weights(opened):
    """What kernels keep of a model's weights between calls is not taken for those of another."""
    model, other = opened
    for one in opened:
        flexmoe.set_budget(one, 0.4)
    ids, before = ids_of(model), logits(model, ids_of(model))
    copied = deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(logits(copied, ids), before)
    assert not torch.equal(logits(model, ids), before)
    moved = logits(other.double(), ids)
    assert difference(moved.float(), before) < LOGIT_TOLERANCE
    assert torch.equal(logits(other.float(), ids), before)


def test_memory_is_given_back_and_comes_back(opened):
    model, whole = opened
    ids, before = ids_of(model), expert_bytes(model)
    assert flexmoe.release(model) == 0  # at budget 0 there is nothing to give
    figures = flexmoe.set_budget(model, 0.2, release=True)
    freed = before - expert_bytes(model)
    for layer in expert_layers(model):  # kernels keep by it what they found out
        offset_E = stored_weights(layer.module).offset_E
        assert offset_E is not None and stored_weights(layer.module).offset_E is offset_E
    layers = model.flexmoe_plan.member(0.0).routed_parameters - figures.routed_parameters
    assert freed == 4 * layers > 0
    assert flexmoe.release(model) == 0
    for share in (0.2, 0.6, 0.4):
        flexmoe.set_budget(model, share)
        flexmoe.set_budget(whole, share)
        assert difference(logits(model, ids), logits(whole, ids)) < LOGIT_TOLERANCE
    more = flexmoe.release(model)  # a further tier, from ragged storage
    assert more > 0
    assert difference(logits(model, ids), logits(whole, ids)) < LOGIT_TOLERANCE
    assert flexmoe.restore(model) == freed + more and expert_bytes(model) == before
    assert flexmoe.restore(model) == 0
    for share in (0.4, 0.0):
        flexmoe.set_budget(model, share)
        flexmoe.set_budget(whole, share)
        assert difference(logits(model, ids), logits(whole, ids)) < LOGIT_TOLERANCE
    for mine, other in zip(model.parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, other) and mine.requires_grad == other.requires_grad


def test_a_part_comes_back_without_the_whole_in_memory(opened, monkeypatch):
    model, whole = opened
    flexmoe.set_budget(model, 0.6, release=True)
    poor, held = expert_bytes(model), []
    read = elastic._read
    monkeypatch.setattr(elastic, "_read", lambda *a: held.append(expert_bytes(model)) or read(*a))
    width = model.flexmoe_plan.widths(0.2)
    came = flexmoe.restore(model, width)
    assert came == expert_bytes(model) - poor > 0
    # before each layer is read, those before it hold their part and those after it what they had
    layers = expert_layers(model)
    assert len(held) == len(layers) and held == sorted(held) and held[-1] < poor + came
    for layer in layers:
        assert elastic.stored_widths(layer) == width[layer.index].tolist()
    ids = ids_of(model)
    for share in (0.2, 0.6):
        flexmoe.set_budget(model, share)
        flexmoe.set_budget(whole, share)
        assert difference(logits(model, ids), logits(whole, ids)) < LOGIT_TOLERANCE
    with pytest.raises(FlexmoeError, match=r"flexmoe\.restore"):
        flexmoe.set_budget(model, 0.0)


def test_what_needs_released_channels_is_refused(opened, tmp_path):
    model, _ = opened
    flexmoe.set_budget(model, 0.4, release=True)
    kept = logits(model, ids_of(model))
    for share in (0.0, 0.2):
        with pytest.raises(FlexmoeError, match=r"flexmoe.restore\(model\) first"):
            flexmoe.set_budget(model, share)
    with pytest.raises(FlexmoeError, match="before it is saved"):
        model.save_pretrained(tmp_path / "saved")
    with pytest.raises(FlexmoeError, match="restore"):
        observe(model, ids_of(model), ["fisher_EI"], batch_size=1)
    assert torch.equal(logits(model, ids_of(model)), kept)  # and nothing changed
    flexmoe.restore(model)
    model.save_pretrained(tmp_path / "saved")
    model.flexmoe_source = None
    with pytest.raises(FlexmoeError, match="needs a model that"):
        flexmoe.release(model)


def test_weights_that_changed_are_not_mixed_with_those_of_the_files(opened):
    model, _ = opened
    flexmoe.set_budget(model, 0.2, release=True)
    with torch.no_grad():
        next(m for n, m in model.named_modules() if n.endswith("experts")).down_proj.mul_(2)
    with pytest.raises(FlexmoeError, match="other weights than the model in memory"):
        flexmoe.restore(model)


def test_serving_goes_on_meanwhile(opened):
    model, _ = opened
    flexmoe.set_budget(model, 0.6)
    ids = ids_of(model)
    want, seen, stop = logits(model, ids), [], threading.Event()

    def serve():
        while not stop.is_set():
            seen.append(logits(model, ids))

    server = threading.Thread(target=serve)
    server.start()
    try:
        for turn in count():  # five, or on a busy machine until as many answers are there
            assert flexmoe.release(model) > 0
            assert flexmoe.restore(model) > 0
            if turn >= 4 and (len(seen) > 5 or not server.is_alive()):
                break
    finally:
        stop.set()
        server.join()
    assert len(seen) > 5 and all(difference(out, want) < LOGIT_TOLERANCE for out in seen)


@pytest.mark.parametrize("is_cuda", [True, False])
def test_on_a_gpu_weights_cannot_go_before_what_reads_them_is_launched(is_cuda, monkeypatch):
    """`elastic._swap` waits for what was launched, and what is launched on another stream later
    would read memory that is somebody else's by then. On a CPU nothing outlives the call."""
    held = []
    monkeypatch.setattr(experts, "experts", lambda *a: held.append(storage.STORAGE.locked()) or "y")
    monkeypatch.setattr(experts, "_budgets", lambda module, x_TH: (None, None))
    monkeypatch.setattr(experts, "stored_weights", lambda module: None)
    x_TH = SimpleNamespace(is_cuda=is_cuda)
    assert experts.prefix_forward(None, x_TH, None, None) == "y"
    assert held == [is_cuda] and not storage.STORAGE.locked()


PROGRAM = """
import sys, torch, flexmoe
from flexmoe.memory import PROCESS, give_back
model = flexmoe.load(sys.argv[1], device="cpu", dtype=torch.float32)
give_back()
rss = [PROCESS.memory_info().rss]
flexmoe.set_budget(model, 0.6)
sizes = [flexmoe.release(model)]
rss.append(PROCESS.memory_info().rss)
sizes.append(flexmoe.restore(model))
rss.append(PROCESS.memory_info().rss)
print(*rss, *sizes)
"""


def test_the_process_shrinks(tmp_path):
    """By what `release` says, within a tenth, and grows again."""
    config = tiny_model("olmoe").config
    config.hidden_size = config.intermediate_size = 512
    model = OlmoeForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    write_family(
        tmp_path / "base", random_plan(model, tmp_path / "base", quantum=32), tmp_path / "family"
    )
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "family")],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    before, small, after, freed, back = map(int, done.stdout.split())
    assert freed == back > 20e6
    assert abs(before - small - freed) < 0.1 * freed
    assert after - small > 0.9 * back


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_memory_of_a_gpu_is_given_back_and_budget_0_is_the_same_to_the_bit(tmp_path):
    model = tiny_model("olmoe")
    model.save_pretrained(tmp_path / "base")
    plan = random_plan(model, tmp_path / "base")
    write_family(tmp_path / "base", plan, tmp_path / "family")
    model = flexmoe.load(tmp_path / "family", device="cuda", dtype=torch.float32)
    ids = ids_of(model).cuda()
    flexmoe.set_budget(model, 0.4)
    poorer = logits(model, ids)
    flexmoe.set_budget(model, 0.0)
    whole, before = logits(model, ids), torch.cuda.memory_allocated()
    flexmoe.set_budget(model, 0.4, release=True)
    assert torch.cuda.memory_allocated() < before
    assert difference(logits(model, ids), poorer) < LOGIT_TOLERANCE
    assert flexmoe.restore(model) > 0
    flexmoe.set_budget(model, 0.0)
    assert torch.equal(logits(model, ids), whole)
