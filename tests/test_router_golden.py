"""Router rules and NAEE's skipping give the logits that official code gave."""

import pytest
import torch

from flexmoe.experts import expert_layers
from flexmoe.observe import observe
from flexmoe.policies import Fitted, parse
from flexmoe.routing.edits import choose_function
from flexmoe.routing.rules import mean_outputs, reroute
from golden_data import golden, golden_logits, relative
from helpers import logits

CLOSE = 1e-5  # absolute, as the goldens' own check against another version of transformers


def without(model, kept, rule, constant):
    """The model under a rule, when of each layer only the experts ``kept`` have channels."""
    width = {}
    for layer in expert_layers(model):
        width[layer.index] = torch.zeros(layer.E, dtype=torch.int)
        width[layer.index][kept[layer.index]] = layer.I
        layer.module.flexmoe_width_E = width[layer.index].tolist()
    reroute(model, rule, width, constant)
    choose_function(model)
    return model


@pytest.mark.parametrize(
    ("model_name", "scored", "kept", "pruned"),
    [
        ("qwen3moe", "reap", "keep.reap.r50", "reap.r50.qwen3moe"),
        ("qwen3moe_cold", "reap", "keep.reap.r50", "reap.r50.qwen3moe_cold"),
        ("mixtral", "naee", "layerwise.keep.r3", "naee.layerwise.keep3.mixtral"),
    ],
)
def test_remove(model_name, scored, kept, pruned):
    model, ids, want = golden(model_name, scored)
    names = [name for name in want if name.endswith(kept) or name.endswith("reap.keep.r50")]
    sets = {int(name.split(".")[1]): want[name] for name in names}
    assert len(sets) == len(expert_layers(model))
    without(model, sets, "remove", {})
    assert float((logits(model, ids) - golden_logits(pruned)).abs().max()) < CLOSE


def test_constant():
    """The official code keeps constants in bfloat16."""
    model, ids, want = golden("olmoe", "mone")
    mean = mean_outputs(observe(model, ids, ["output_EH"], batch_size=4))
    kept = {i: want[f"layer.{i}.keep.r25"] for i in mean}
    for i, mean_EH in mean.items():
        official_EH = want[f"layer.{i}.mean_out"]
        assert float((mean_EH - official_EH).norm() / official_EH.norm()) < 1e-6
        mean_EH[want[f"layer.{i}.removed.r25"]] = want[f"layer.{i}.novice.r25"].float()
    without(model, kept, "constant", mean)
    assert float((logits(model, ids) - golden_logits("mone.r25.olmoe")).abs().max()) < CLOSE


def test_naee_skips():
    model, ids, want = golden("mixtral", "naee")
    fitted = Fitted(*parse("naee-skip"), ids)
    fitted.use(model)
    for i, beta in fitted.numbers.items():
        assert relative(torch.tensor(beta), want[f"layer.{i}.skip_beta"]) < CLOSE
        weight_NK = fitted.facts[i].weight_NK.double()
        mean = (weight_NK[:, 1] / weight_NK[:, 0]).mean()
        assert relative(mean, want[f"layer.{i}.skip_ratio_mean"]) < CLOSE
    assert float((logits(model, ids) - golden_logits("naee.skip.mixtral")).abs().max()) < CLOSE
