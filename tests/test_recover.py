"""Recovery: a family stays a family; what is trained, what is not; a kill changes nothing."""

import dataclasses
import functools
import json
import sys
from itertools import islice

import pytest
import torch

import flexmoe
from flexmoe.around import router_weights
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.family import load, set_budget
from flexmoe.lora import lora_experts
from flexmoe.pipeline import CompressConfig, compress
from flexmoe.plan import Plan
from flexmoe.recover import prepare, recover
from flexmoe.recover_config import RecoverConfig
from flexmoe.resume import Work, work_folder
from test_router_rules import expert_plan
from zoo import tiny_model

SMALL = RecoverConfig(data="tiny", tokens=32 * 6, seq_len=16, batch_size=2)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    out = tmp_path_factory.mktemp("recover") / "family"
    config = CompressConfig(samples=8, seq_len=32, allocate="global", pruned=(0.2, 0.4, 0.6))
    compress("tiny", out, config)
    return out


def tensors(folder):
    model = load(folder, dtype=torch.float32)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("mode", ["full", "router", "lora"])
def test_a_family_stays_a_family(family, tmp_path, mode):
    out = tmp_path / "out"
    record = recover(family, out, dataclasses.replace(SMALL, mode=mode))
    before, after = Plan.load(family), Plan.load(out)
    assert after.recipe.recovery[0]["mode"] == mode == record["mode"]
    assert all(torch.equal(before.order[i], after.order[i]) for i in before.order)
    assert all(torch.equal(before.width[i], after.width[i]) for i in before.width)
    was, now = tensors(family), tensors(out)
    changed = {name for name in was if not torch.equal(was[name], now[name])}
    experts = {name for name in was if ".experts." in name}
    gates = {name for layer in expert_layers(load(family)) for name in router_weights(layer)}
    assert len(gates) == 4 and not gates & experts
    want = {"full": experts | gates, "router": gates, "lora": experts}[mode]
    assert changed == want
    assert not work_folder(out).exists()


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "deepseek_v2"])
def test_merged_equals_adapter_and_teacher_is_the_original(kind):
    model = tiny_model(kind).eval()
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        original = model(ids).logits
        with lora_experts(model, rank=4, seed=0) as adapter:
            width = {layer.index: torch.full((layer.E,), 3) for layer in expert_layers(model)}
            adapter.only_first(width)
            for parameter in adapter.parameters:
                parameter.add_(0.1 * torch.randn_like(parameter) * (parameter != 0))
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            adapted = model(ids).logits
            with adapter.off():
                assert torch.equal(model(ids).logits, original)
        assert not torch.allclose(adapted, original, atol=1e-3)
        assert torch.allclose(model(ids).logits, adapted, atol=1e-5)
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_batches_are_drawn_when_they_are_needed(family, tmp_path, monkeypatch):
    drawn = flexmoe.distil.batches

    def few(*args):
        yield from islice(drawn(*args), 3)
        raise AssertionError("more than are needed")

    def killer(items, description):
        yield next(iter(items))
        raise KeyboardInterrupt

    monkeypatch.setattr("flexmoe.distil.batches", few)
    config = dataclasses.replace(SMALL, tokens=10**15)
    with pytest.raises(KeyboardInterrupt):
        recover(family, tmp_path / "out", config, track=killer)


def test_a_killed_run_goes_on_to_the_same_weights(family, tmp_path, monkeypatch):
    config = dataclasses.replace(SMALL, lr=1e-3)
    recover(family, tmp_path / "whole", config)
    monkeypatch.setattr("flexmoe.resume.EVERY", 0.0)
    seen = 0

    def killer(items, description):
        nonlocal seen
        for item in items:
            yield item
            if description == "recover":
                seen += 1
                if seen == 4:
                    raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recover(family, tmp_path / "broken", config, track=killer)
    assert not (tmp_path / "broken").exists() and work_folder(tmp_path / "broken").is_dir()
    with pytest.raises(FlexmoeError, match=r"another command.*lr"):
        recover(family, tmp_path / "broken", dataclasses.replace(config, lr=2e-3))
    steps = []

    def counting(items, description):
        for item in items:
            if description == "recover":
                steps.append(item)
            yield item

    recover(family, tmp_path / "broken", config, track=counting)
    assert steps == [4, 5]  # four steps were done and kept
    whole, broken = tensors(tmp_path / "whole"), tensors(tmp_path / "broken")
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    assert not work_folder(tmp_path / "broken").exists()


def test_micro_batches_and_recomputed_activations_change_nothing_but_rounding(family, tmp_path):
    config = dataclasses.replace(SMALL, batch_size=4, tokens=64 * 3)
    recover(family, tmp_path / "a", config)
    recover(family, tmp_path / "b", dataclasses.replace(config, micro_batch=1, checkpointing=True))
    one, other, begin = (tensors(path) for path in (tmp_path / "a", tmp_path / "b", family))
    # where a gradient is next to nothing its rounding decides the sign of Adam's step, and files
    # are bf16: single weights differ, the change as a whole does not
    apart = sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5
    change = sum(float((one[name] - begin[name]).square().sum()) for name in one) ** 0.5
    assert apart < 0.05 * change


def test_what_is_needed_is_told_as_doctor_counts_it(family):
    """Of LoRA the rank counts; the tensors it is merged into have no gradients and moments."""
    needed = {}
    for mode, rank in (("full", None), ("lora", 1), ("lora", 16), ("closed-form", None)):
        ready = prepare(family, dataclasses.replace(SMALL, mode=mode, rank=rank))
        needed[mode, rank] = ready.memory
    model = ready.source.model
    layers, total = expert_layers(model), sum(p.numel() for p in model.parameters())
    rows = sum(layer.E * (3 * layer.I + 2 * layer.H) for layer in layers)
    assert needed["lora", 16] - needed["lora", 1] == 12 * 15 * rows
    routed = sum(layer.shape.parameters for layer in layers)
    assert needed["lora", 1] == 4 * total + 4 * routed + 12 * rows
    moments = 4 * sum(layer.E * layer.I**2 for layer in layers)
    assert needed["closed-form", None] == 4 * total + moments
    assert needed["full", None] > 4 * total + 16 * routed > needed["lora", 16]


def test_a_plan_alone_becomes_a_family(family, tmp_path):
    plan = Plan.load(family)
    plan.save(tmp_path / "plan")
    recover(tmp_path / "plan", tmp_path / "out", SMALL, base="tiny")
    recover(family, tmp_path / "same", SMALL)
    alone, whole = tensors(tmp_path / "out"), tensors(tmp_path / "same")
    assert all(torch.equal(alone[name], whole[name]) for name in alone)


@pytest.mark.parametrize("ranked", [True, False], ids=["family", "plan alone"])
def test_the_closed_form_layer_by_layer_is_that_of_the_whole_model(family, tmp_path, ranked):
    config = dataclasses.replace(SMALL, mode="closed-form", tokens=16 * 16)
    given, base = (family, None) if ranked else (tmp_path / "plan", "tiny")
    if not ranked:
        Plan.load(family).save(given)
    recover(given, tmp_path / "whole", config, base=base)
    recover(given, tmp_path / "by-layer", dataclasses.replace(config, memory=2**36), base=base)
    begin, whole, other = (
        tensors(path) for path in (family, tmp_path / "whole", tmp_path / "by-layer")
    )
    for name, tensor in whole.items():
        if name.endswith("down_proj"):
            change = (tensor - begin[name]).norm()
            # both are rounded to bf16 after sums in another order
            assert change > 0 and (tensor - other[name]).norm() < 0.02 * change, name
        else:
            assert torch.equal(tensor, other[name]), name
    record = Plan.load(tmp_path / "by-layer").recipe.recovery[-1]
    assert record["memory"] == 2**36 and not work_folder(tmp_path / "by-layer").exists()


def test_the_closed_form_layer_by_layer_goes_on_after_a_kill(family, tmp_path):
    config = dataclasses.replace(SMALL, mode="closed-form", tokens=16 * 16, memory=2**36)
    recover(family, tmp_path / "unbroken", config)
    taken = []

    def track(items, description, kill_at=None):
        for item in items:
            if description == "refit":
                if len(taken) == kill_at:
                    raise KeyboardInterrupt
                taken.append(item)
            yield item

    with pytest.raises(KeyboardInterrupt):
        recover(family, tmp_path / "out", config, track=functools.partial(track, kill_at=2))
    recover(family, tmp_path / "out", config, track=track)
    assert taken == [0, 1, 2, 3]  # none twice: the state was kept after the second
    want, found = tensors(tmp_path / "unbroken"), tensors(tmp_path / "out")
    assert all(torch.equal(want[name], found[name]) for name in want)


def test_recovery_lowers_the_loss_of_pruned_members(family, tmp_path):
    config = RecoverConfig(tokens=40 * 512, seq_len=64, batch_size=8, lr=1e-3)
    recover(family, tmp_path / "out", config)
    from flexmoe.evaluation.evaluate import EvaluateConfig, mean_nll, measure

    def loss(folder, pruned):
        rows = measure(folder, EvaluateConfig(pruned=[pruned], samples=4, seq_len=128)).rows
        return mean_nll({row["data"]: row for row in rows})

    assert loss(tmp_path / "out", 0.6) < loss(family, 0.6) - 0.02


def test_state_that_is_damaged_is_refused(tmp_path):
    work = Work(tmp_path / "x", {"a": 1})
    stage = work.stage("s")
    stage.save(1, {"t": torch.ones(3)})
    assert stage.load()[0] == 1
    data = work.path / json.loads((work.path / "s.json").read_text())["file"]
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    work.stage("other").save(1, {"t": torch.ones(3)})
    with pytest.raises(FlexmoeError, match="damaged"), work.on():
        stage.load()
    assert work.stage("other").load()[0] == 1  # is kept
    (work.path / "s.json").unlink()  # as it says
    assert stage.load() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "ful"}, "Did you mean 'full'"),
        ({"scheme": "spp"}, "Did you mean 'sp'"),
        ({"at": 0.4, "scheme": "cp"}, "at has no effect"),
        ({"at": 0.4, "mode": "closed-form"}, "at has no effect"),
        ({"at": 0.7}, "outside this plan"),
        ({"mode": "closed-form", "lr": 0.1}, "lr has no effect"),
        ({"rank": 4}, "rank has no effect"),
        ({"rank": 65, "mode": "lora"}, "more than an expert's matrices can have, 64"),
        ({"memory": 2**30}, "memory has no effect"),
        ({"mode": "lora", "shard": True}, "shard has no effect"),
        ({"tokens": 10}, "less than one batch"),
        ({"lr": 2.0}, "between 0 and 1"),
        ({"micro_batch": 0}, "at least 1"),
        ({"seed": 1_764_000_000_000_000_000}, r"between 0 and 2\^40"),
    ],
)
def test_mistakes_are_found_before_the_model_is_loaded(family, change, message):
    with pytest.raises(FlexmoeError, match=message):
        prepare(family, dataclasses.replace(SMALL, **change))


def test_a_missing_package_is_found_before_the_model_is_loaded(family, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(FlexmoeError, match="needs peft: pip install"):
        prepare(family, dataclasses.replace(SMALL, mode="lora"))


def test_members_that_the_plan_lacks_are_refused_before_the_model_is_loaded(tmp_path):
    experts = expert_plan(load("tiny"), "tiny", budgets=(0.0, 0.25, 0.5))
    experts.save(tmp_path / "experts")
    for scheme in (None, "family", "cp"):
        config = dataclasses.replace(SMALL, scheme=scheme)
        with pytest.raises(FlexmoeError, match=r"one of them with --at \(0.25, 0.5\), or --mode"):
            prepare(tmp_path / "experts", config, "tiny")
    with pytest.raises(FlexmoeError, match=r"those of its budgets only.*by default: give --at"):
        prepare(tmp_path / "experts", dataclasses.replace(SMALL, scheme="sp"), "tiny")
    for fine in ({"at": 0.25}, {"mode": "closed-form"}):
        prepare(tmp_path / "experts", dataclasses.replace(SMALL, **fine), "tiny")


def test_a_plan_that_changes_the_router_is_refused(tmp_path):
    """What helps is another plan: of an export nothing can be recovered."""
    plan = expert_plan(load("tiny"), "tiny", budgets=(0.0, 0.25, 0.5))
    recipe = plan.recipe.model_copy(update={"router": "remove"})
    dataclasses.replace(plan, recipe=recipe).save(tmp_path / "plan")
    with pytest.raises(FlexmoeError, match="rule 'remove': compress with --router keep"):
        prepare(tmp_path / "plan", SMALL, "tiny")


@pytest.mark.parametrize("memory", [None, 2**36])
def test_a_plan_alone_is_not_put_on_other_weights(family, tmp_path, memory):
    Plan.load(family).save(tmp_path / "plan")
    config = dataclasses.replace(SMALL, mode="closed-form", memory=memory)
    with pytest.raises(FlexmoeError, match="are not those that the plan was made for"):
        prepare(tmp_path / "plan", config, base=family)


def test_an_existing_folder_is_left_alone(family, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(flexmoe.FlexmoeError, match="exists already"):
        recover(family, tmp_path / "out", SMALL)
    set_budget(load(family), 0.2)
