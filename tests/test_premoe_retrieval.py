"""PreMoe: what tells tasks apart before the first experts, and which pattern a prompt gets."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.family import load_stock
from flexmoe.premoe import Store, load
from flexmoe.premoe.nearness import distances
from flexmoe.premoe.pattern import Reach
from flexmoe.premoe.retrieval import nearest
from flexmoe.premoe.signature import (
    front,
    mean_signature,
    measure_reach,
    prompt_lengths,
    router_logits,
    signatures,
)
from helpers import ids_of
from patterns import FORMS, made_pattern, saved
from zoo import tiny_model

CPU = torch.device("cpu")
SHORT = {"samples": 8, "seq_len": 32}


@pytest.mark.parametrize("name", FORMS)
def test_the_first_router_is_read_without_any_experts(name, tmp_path):
    """Also where nothing behind that router could be computed."""
    model = tiny_model(name)
    model.save_pretrained(tmp_path)
    ids, first = ids_of(model), expert_layers(model)[0]
    want, seen = router_logits(model, ids), []
    router = next(m for n, m in model.named_modules() if n.endswith((".gate", ".router")))
    router.register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(input_ids=ids)
        for parameter in first.parameters.values():
            parameter.fill_(math.nan)
    whole = seen[0][0] if isinstance(seen[0], tuple) else seen[0]
    assert torch.equal(want.flatten(0, 1), whole.reshape(-1, first.E).float())
    assert torch.equal(router_logits(model, ids), want)
    with front(tmp_path, CPU) as network:
        assert torch.equal(router_logits(network, ids), want)
        experts = [p for layer in expert_layers(network) for p in layer.parameters.values()]
        assert all(parameter.is_meta for parameter in experts)
    assert torch.allclose(signatures(model, ids), want.double().mean(1))


def test_one_prompt_in_twenty_may_be_out_of_reach():
    model = tiny_model("qwen3_moe")
    ids = torch.randint(3, 60, (40, 32), generator=torch.Generator().manual_seed(1))
    centre_E = mean_signature(model, ids, 8)
    assert torch.allclose(centre_E, router_logits(model, ids).double().mean((0, 1)))
    held = torch.randint(3, 60, (40, 32), generator=torch.Generator().manual_seed(2))
    (short, long), spreads = measure_reach(model, ids, held, centre_E, 8)
    assert (short.tokens, short.prompts, long.tokens, long.prompts) == (16, 80, 32, 40)
    for reach in (short, long):
        own_nE = signatures(model, ids.reshape(-1, reach.tokens)) - centre_E
        covariance_EE = own_nE.T @ own_nE / len(own_nE)
        want_EE = (covariance_EE + covariance_EE.diagonal().diag()) / 2
        assert torch.allclose(spreads[reach.tokens], want_EE)
        away_nE = signatures(model, held.reshape(-1, reach.tokens)) - centre_E
        distance = torch.einsum("ne,ef,nf->n", away_nE, want_EE.inverse(), away_nE).sqrt()
        inside = int((distance <= reach.distance + 1e-9).sum())
        assert inside == math.ceil(0.95 * (reach.prompts + 1))
    (few,), spreads = measure_reach(model, ids[:3, :12], held[:3, :12], centre_E, 8)
    last = distances(signatures(model, held[:3, :12]), centre_E, spreads[12])
    assert few.distance == float(last.max())
    (_,), same = measure_reach(model, ids[:1, :12], ids[:1, :12], centre_E, 8)
    assert (
        torch.linalg.cholesky(same[12]).isfinite().all()
    )  # one prompt, and a distance all the same
    assert prompt_lengths(100) == [16, 32, 64, 100] and prompt_lengths(16) == [16]


def test_a_query_gets_the_nearest_pattern_or_the_full_model(tmp_path):
    source, store = saved("qwen3_moe", tmp_path, ())
    model = load_stock(source, dtype=torch.float32)
    a, b = torch.randint(3, 60, (2, 20), generator=torch.Generator().manual_seed(3))
    for task, ids in (("a", a), ("b", b)):
        made = replace(made_pattern(task, source), signature_E=signatures(model, ids[None])[0])
        one = Reach(tokens=16, prompts=1, distance=1e-6)
        replace(made, reach=(one,), spread={16: made.spread[16]}).save(store)
    opened = load(source, keep=0.5, store=store, dtype=torch.float32)
    for task, ids in (("a", a), ("b", b)):
        match = opened.adapt(ids)
        assert (match.task, match.nearest) == (task, task) and match.distance < 1e-6
        assert match.distances.keys() == {"a", "b"}
        assert opened.model.flexmoe_plan is opened.plans[task]
        assert min(layer.module.flexmoe_width_E.count(0) for layer in expert_layers(opened.model))
    match = opened.adapt(torch.cat([a[:10], b[:10]]))
    assert match.task is None and match.distance > match.reach == 1e-6
    assert match.distance == min(match.distances.values()) == match.distances[match.nearest]
    assert not any(0 in layer.module.flexmoe_width_E for layer in expert_layers(opened.model))
    for wrong in (a[None], a[:0]):
        with pytest.raises(FlexmoeError, match="the tokens"):
            opened.retrieve(wrong)


def test_shorter_prompts_may_be_further_away(tmp_path):
    saved("qwen3_moe", tmp_path)
    pattern = Store(tmp_path / "store").load("a")
    assert [pattern.reach_at(n) for n in (3, 16, 32, 64, 500)] == [2, 2, 1.5, 1, 1]


def test_the_nearest_task_is_the_one_whose_own_text_is_least_exceeded(tmp_path):
    """Deviations and reaches are those of the prompt's length, between two of them on a line."""
    saved("qwen3_moe", tmp_path)
    a, b = Store(tmp_path / "store").load_all()
    wide = {16: 9 * a.spread[16], 64: a.spread[64]}
    near = replace(a, spread=wide)
    query = a.signature_E + 3.0 / math.sqrt(8)
    assert near.distance(query, 16) == pytest.approx(1)
    assert near.distance(query, 64) == pytest.approx(3)
    assert near.distance(query, 32) == pytest.approx(3 / math.sqrt(5))
    twin = replace(
        b,
        signature_E=a.signature_E,
        reach=tuple(r.model_copy(update={"distance": 4 * r.distance}) for r in b.reach),
    )
    match = nearest([near, twin], query, 16)  # 1 of 2 against 3 of 8
    assert (match.task, match.distance, match.reach) == ("b", pytest.approx(3), 8)
    match = nearest([near, replace(twin, reach=b.reach)], query, 64)
    assert match.task is None and match.distance == pytest.approx(3) and match.reach == 1
