"""What a step of recovery is made of: members, gradients, exchanged weights."""

from contextlib import nullcontext

import pytest
import torch

from flexmoe.distil import (
    LABELS,
    STRATA,
    Schedule,
    Swapped,
    _backward,
    _factors,
    _losses,
    distil,
    parts_of_step,
    stratum_weights,
)
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.family import attach, set_budget
from flexmoe.headers import resolve
from flexmoe.statistics import token_loss
from flexmoe.training import divergence
from helpers import logits, random_plan
from zoo import tiny_model


def test_the_schemes_draw_their_members():
    strata = parts_of_step("family", 0.4, 0.8, 8, 3, [1.0] * STRATA, 0)
    assert sorted(row for part in strata for row in part.rows.tolist()) == list(range(8))
    assert strata[0].pruned == 0 and all(0 <= part.pruned <= 0.8 for part in strata)
    assert parts_of_step("sp", 0.4, 0.8, 8, 3, [], 0)[0].pruned == 0.4
    full, poorest, *others = parts_of_step("cp", 0.4, 0.8, 8, 3, [], 0)
    assert (full.pruned, full.cross_entropy, full.divergence) == (0.0, 1.0, 0.0)
    assert poorest.pruned == 0.8 and len(others) == 2 and all(part.scaled for part in others)
    again = parts_of_step("cp", 0.4, 0.8, 8, 3, [], 0)
    assert [part.pruned for part in again] == [full.pruned, 0.8, *(p.pruned for p in others)]
    # over the steps every row meets every stratum, also in batches of one
    # the loss is summed over rows: a stratum counts by its weight, not by its rows again
    uneven = parts_of_step("family", 0.4, 0.8, 6, 0, [0.4, 0.3, 0.2, 0.1], 0)
    assert [part.divergence for part in uneven] == [0.4, 0.3, 0.2, 0.1]
    assert [part.cross_entropy for part in uneven] == [LABELS * w for w in (0.4, 0.3, 0.2, 0.1)]
    alone = parts_of_step("family", 0.4, 0.8, 6, 0, [0.4, 0.3, 0.2, 0.1], 0, labels=0.0)
    assert all(part.cross_entropy == 0 for part in alone)
    drawn = [parts_of_step("family", 0.4, 0.9, 1, step, [1.0] * STRATA, 0) for step in range(4)]
    assert all(len(parts) == 1 for parts in drawn)
    assert [round(parts[0].pruned // 0.3) for parts in drawn[1:]] == [0, 1, 2]


def test_strata_count_by_the_root_of_their_loss_and_the_full_model_twice_the_richest(monkeypatch):
    probed = []

    def losses(model, teacher, ids, parts, micro):
        probed.extend((part.pruned, part.divergence, part.cross_entropy) for part in parts)
        return torch.tensor([16.0, 64.0, 0.0])  # of 4 tokens

    monkeypatch.setattr("flexmoe.distil._losses", losses)
    found = stratum_weights(None, torch.zeros(2, 3), 0.9, 1)
    weight = [2 * 0.5, 0.5, 0.25, 1e-3**-0.5]  # nothing counts as less than 1e-3
    assert found == pytest.approx([w / sum(weight) for w in weight])
    assert probed == [(pytest.approx(share), 1, 0) for share in (0.15, 0.45, 0.75)]


def test_the_rate_rises_over_a_twentieth_and_falls_to_nothing():
    schedule = Schedule(steps=100, batch_size=1, micro_batch=1, lr=2.0, seed=0)
    found = [schedule.rate(step) for step in (0, 1, 4, 50, 99)]
    assert found == pytest.approx([0.4, 0.8 * 0.99, 2 * 0.96, 1.0, 0.02])


def test_exchanged_weights_come_back_bit_for_bit():
    parameter = torch.nn.Parameter(torch.randn(3))
    swapped = Swapped([parameter])
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter.add_(1)
    trained = parameter.detach().clone()
    with swapped.original():
        assert torch.equal(parameter, before)
    assert torch.equal(parameter, trained)


@pytest.mark.parametrize("scheme", ["family", "cp"])
def test_gradients_are_those_of_the_parts_however_a_batch_is_split(scheme):
    model = tiny_model("mixtral")
    attach(model, random_plan(model, resolve("tiny")), ranked=False)
    parameters = [layer.module.down_proj.requires_grad_() for layer in expert_layers(model)]
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    parts = parts_of_step(scheme, 0.4, 0.6, 4, 0, [0.4, 0.3, 0.2, 0.1], 0)
    found = []
    for micro in (4, 1):
        model.zero_grad()
        arguments = (model, nullcontext, ids, parts)
        factors = _factors(parts, _losses(*arguments, micro))
        _backward(*arguments, factors, micro)
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
    model.zero_grad()
    set_budget(model, 0.0)
    taught_NTV, losses = logits(model, ids), []
    for part in parts:
        set_budget(model, part.pruned)
        out_NTV = model(input_ids=ids[part.rows]).logits
        loss = part.divergence * divergence(out_NTV, taught_NTV[part.rows])
        losses.append(loss + part.cross_entropy * token_loss(out_NTV, ids[part.rows]))
        if part.scaled:
            losses[-1] = losses[-1] * (losses[0].item() / losses[-1].item())
    (sum(losses) / ids[:, 1:].numel()).backward()
    want = torch.cat([p.grad.flatten() for p in parameters])
    for got in found:
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6 * float(want.abs().max()))


def test_a_run_scales_the_members_of_cp_and_goes_by_the_rate_of_each_step(monkeypatch):
    model, scaled = tiny_model("mixtral"), []
    attach(model, random_plan(model, resolve("tiny")), ranked=False)
    parameters = [layer.module.down_proj for layer in expert_layers(model)]
    before = [p.detach().clone() for p in parameters]

    def backward(model, teacher, batch, parts, factors, micro):
        scaled.append(factors)
        assert [part.pruned for part in parts[:2]] == [0.0, 0.6]  # full, and the plan's poorest
        for parameter in parameters:
            parameter.grad = torch.ones_like(parameter)

    monkeypatch.setattr("flexmoe.distil._losses", lambda *a: torch.tensor([4.0, 2.0, 1.0, 8.0]))
    monkeypatch.setattr("flexmoe.distil._backward", backward)
    monkeypatch.setattr(Schedule, "rate", lambda self, step: [0.25, 0.5][step])
    schedule = Schedule(steps=2, batch_size=4, micro_batch=4, lr=1e-3, seed=0)
    distil(model, parameters, nullcontext, torch.full((4, 12), 5), schedule, scheme="cp")
    assert scaled == [pytest.approx([1, 2, 4, 0.5])] * 2
    for parameter, was in zip(parameters, before, strict=True):  # Adam moves by the rate
        assert torch.allclose(parameter, was - 0.75, atol=1e-3)


def test_a_step_that_is_not_finite_ends_the_run():
    """Before it is in the weights."""
    model = tiny_model("mixtral")
    attach(model, random_plan(model, resolve("tiny")), ranked=False)
    model.lm_head.weight.data[0] = torch.inf
    parameters = [layer.module.down_proj for layer in expert_layers(model)]
    swapped, before = Swapped(parameters), [p.detach().clone() for p in parameters]
    schedule = Schedule(steps=1, batch_size=4, micro_batch=4, lr=1e-3, seed=0)
    with pytest.raises(FlexmoeError, match="not finite"):
        distil(model, parameters, swapped.original, torch.full((4, 12), 5), schedule)
    assert all(torch.equal(p, was) for p, was in zip(parameters, before, strict=True))
