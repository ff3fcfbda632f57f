"""The action training: formulas by hand, gradients by finite differences, a whole small run."""

import math

import pytest
import torch

from flexmoe.actions import ActionConfig, Actions, learn_widths, quality_loss
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from zoo import tiny_model


def actions_of(logits=None, **settings):
    layer = expert_layers(tiny_model("mixtral"))[0]
    made = Actions(layer, ActionConfig(**settings))
    if logits is not None:
        made.logits_EA.data = torch.tensor(logits)
    return made


def test_formulas_by_hand():
    """Two experts with tokens, shares 3/4 and 1/4; two actions that keep a half or all."""
    a = actions_of([[0.0, 0.0]] + [[0.0, math.log(3)]] * 7, actions=(0.5, 1.0))
    a.layer.module.flexmoe_load_E = torch.tensor([3, 1, 0, 0, 0, 0, 0, 0])
    assert torch.allclose(a.clean_EA[:2], torch.tensor([[0.5, 0.5], [0.25, 0.75]]))
    # C = 3/4 (0.5 * 0.5 + 0.5 * 1) + 1/4 (0.25 * 0.5 + 0.75 * 1)
    assert a.cost(0.0).item() == pytest.approx(0.75 * 0.75 + 0.25 * 0.875)
    # a floor of 1 is the plain mean over experts
    assert a.cost(1.0).item() == pytest.approx((0.75 + 7 * 0.875) / 8)
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert a.entropy().item() == pytest.approx((math.log(2) + 7 * quarter) / 8, rel=1e-6)
    assert a.width().tolist() == [8] + [16] * 7  # a tie goes to the first, thinner action


def test_the_thickest_action_leads_at_the_start():
    a = actions_of()
    assert a.keep_A.tolist() == [2, 7, 12, 16]  # ceil(r * 16)
    assert (a.clean_EA[:, 3] > 0.85).all() and (a.width() == 16).all()


def test_the_sampled_mask_is_hard_and_its_gradient_soft():
    a = actions_of(torch.randn(8, 4).tolist())
    generator = torch.Generator()
    mask_EI = a.sample(0.7, generator.manual_seed(1))
    length = mask_EI.sum(1).round().int()
    prefix = (torch.arange(16) < length[:, None]).float()
    assert torch.allclose(mask_EI, prefix, atol=1e-6)
    assert set(length.tolist()) <= set(a.keep_A.tolist())
    weight_EI = torch.randn(8, 16, generator=generator)

    def soft(logits):
        uniform = torch.rand(8, 4, generator=generator.manual_seed(1))
        gumbel = -torch.log(-torch.log(uniform.clamp(1e-9, 1 - 1e-7)))
        probability = torch.softmax((logits + gumbel) / 0.7, 1)
        return (probability @ a.prefix_AI * weight_EI).sum()

    (a.sample(0.7, generator.manual_seed(1)) * weight_EI).sum().backward()
    at, step = a.logits_EA.detach(), 1e-2
    for e, k in ((0, 0), (3, 2), (7, 3)):
        shift = torch.zeros(8, 4)
        shift[e, k] = step
        slope = (soft(at + shift) - soft(at - shift)) / (2 * step)
        assert a.logits_EA.grad[e, k].item() == pytest.approx(slope.item(), rel=2e-2, abs=1e-3)


def test_quality_is_cross_entropy_when_student_is_teacher():
    logits, ids = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    want = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert quality_loss(logits, logits, ids).item() == pytest.approx(want.item(), rel=1e-5)
    assert quality_loss(torch.zeros_like(logits), logits, ids) > math.log(7)  # CE of a coin + KL


def test_one_run_walks_to_the_poorest_budget_and_leaves_the_weights_alone():
    model = tiny_model("olmoe")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.randint(3, 60, (16, 12), generator=torch.Generator().manual_seed(0))
    config = ActionConfig(steps=60, load_floor=0.5)
    path = learn_widths(model, ids, config, batch_size=4)
    shares = [share for share, _ in path]
    assert shares == sorted(shares) and shares[0] < 0.3 and shares[-1] > 0.75
    for share, width in path:
        total = sum(int(w.sum()) for w in width.values())
        assert share == pytest.approx(1 - total / (2 * 8 * 16))
        assert all(set(w.tolist()) <= {2, 7, 12, 16} for w in width.values())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    again = learn_widths(model, ids, config, batch_size=4)
    assert [share for share, _ in again] == shares
    other = learn_widths(model, ids, config, batch_size=4, seed=1)
    assert [share for share, _ in other] != shares
    assert not any(hasattr(layer.module, "flexmoe_mask_EI") for layer in expert_layers(model))


def test_a_step_that_is_not_finite_ends_the_run():
    model = tiny_model("olmoe")
    model.lm_head.weight.data[0] = torch.inf
    with pytest.raises(FlexmoeError, match="not finite"):
        learn_widths(model, torch.full((4, 12), 5), ActionConfig(steps=1), batch_size=4)


def test_no_steps_are_refused():
    with pytest.raises(FlexmoeError, match="at least 1 step"):
        ActionConfig(steps=0)
