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
)
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.family import attach
from flexmoe.headers import resolve
from helpers import random_plan
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
def test_gradients_do_not_depend_on_how_a_batch_is_split(scheme):
    model = tiny_model("mixtral")
    attach(model, random_plan(model, resolve("tiny")), ranked=False)
    parameters = [layer.module.down_proj.requires_grad_() for layer in expert_layers(model)]
    ids = torch.randint(3, 60, (4, 12), generator=torch.Generator().manual_seed(0))
    parts = parts_of_step(scheme, 0.4, 0.6, 4, 0, [0.25] * STRATA, 0)
    found = []
    for micro in (4, 1):
        model.zero_grad()
        arguments = (model, nullcontext, ids, parts)
        factors = _factors(parts, _losses(*arguments, micro))
        _backward(*arguments, factors, micro)
        found.append(torch.cat([p.grad.flatten() for p in parameters]))
    assert torch.allclose(*found, rtol=1e-4, atol=1e-6 * float(found[0].abs().max()))


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
