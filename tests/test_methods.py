"""Scores equal those of the methods' official code; statistics merge; bad methods are refused."""

import hashlib

import pytest
import torch

from flexmoe.allocate import order_of
from flexmoe.config import CompressConfig, check_config
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers, experts_function
from flexmoe.methods import (
    METHODS,
    Method,
    Text,
    all_methods,
    find_method,
    score_layers,
    score_model,
)
from flexmoe.methods.camera import energy
from flexmoe.observe import observe
from flexmoe.statistics import THIN, thin_experts, token_loss
from golden_data import golden, golden_logits, golden_model, relative, scores

TOLERANCE = 1e-4  # relative, as recommended for scores from gradients or float32 squares


MODELS = ["qwen3moe", "qwen3moe_cold", "qwen3moe_top8", "mixtral", "olmoe"]


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_logits_that_official_code_started_from(name):
    """Under our experts function, which computes what all statistics are taken from."""
    model, ids = golden_model(name)
    for layer in expert_layers(model):
        layer.module.flexmoe_mask_EI = torch.ones(layer.E, layer.I)
    with experts_function(model, "flexmoe_mask"), torch.no_grad():
        logits = model(ids).logits
    assert float((logits - golden_logits(f"unpruned.{name}")).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["qwen3moe", "mixtral", "olmoe"])
def test_taylor_equals_flexmoe_ranking(name):
    """And the loss of every batch, a mean over its 4 x 31 predicted tokens."""
    model, ids, want = golden(name, "flexmoe_rank")
    got, _ = scores(model, ids, "taylor")
    with torch.no_grad():
        losses = [token_loss(model(batch).logits, batch) / (4 * 31) for batch in ids.split(4)]
    assert relative(torch.stack(losses).double(), want["batch_loss"]) < TOLERANCE
    for i, score in got.items():
        assert relative(score, want[f"layer.{i}.score"].double()) < TOLERANCE
        order = order_of(score).long()
        assert torch.equal(order, want[f"layer.{i}.perm"])


@pytest.mark.parametrize("name", ["qwen3moe", "qwen3moe_cold"])
def test_heapr_equals_official_code(name):
    """The official code drops the factor 1/2, takes the mean loss of a batch (4 x 31 predicted
    tokens) where ours is a sum, and marks experts without tokens by -1 where ours are 0."""
    model, ids, want = golden(name, "heapr")
    got, statistics = scores(model, ids, "heapr")
    flat_got, flat_want = [], []
    for i, score in got.items():
        official = want[f"layer.{i}.score"].double()
        ours = 2 * score / (4 * 31) ** 2
        cold = statistics[i]["count_E"] == 0
        assert (official[cold] == -1).all() and (ours[cold] == 0).all()
        assert relative(ours[~cold], official[~cold]) < TOLERANCE
        flat_got.append(ours)
        flat_want.append(torch.stack([want[f"layer.{i}.keep.r25"], want[f"layer.{i}.keep.r50"]]))
    for share, kept in zip((0.25, 0.5), torch.stack(flat_want).unbind(1), strict=True):
        ours = torch.stack(flat_got).flatten()
        keep = int(len(ours) * (1 - share))
        best = torch.zeros_like(ours, dtype=torch.bool)
        best[ours.argsort(descending=True)[:keep]] = True
        assert torch.equal(best, kept.flatten())


@pytest.mark.parametrize("name", ["qwen3moe", "qwen3moe_cold"])
def test_heapr_prunes_to_the_official_logits(name):
    model, ids, want = golden(name, "heapr")
    for layer in expert_layers(model):
        layer.module.flexmoe_mask_EI = want[f"layer.{layer.index}.keep.r50"].float()
    with experts_function(model, "flexmoe_mask"), torch.no_grad():
        logits = model(ids).logits
    assert float((logits - golden_logits(f"heapr.r50.{name}")).abs().max()) < 1e-5


def test_camera_equals_official_code():
    model, ids, want = golden("qwen3moe_top8", "camera")
    statistics = observe(model, ids, all_methods()["camera"].needs, batch_size=4)
    for layer in expert_layers(model):
        for alpha, key in ((0.9, "a90"), (1.0, "a100")):
            got = energy(layer, statistics[layer.index], alpha)
            official = want[f"layer.{layer.index}.score.{key}"].double()
            assert relative(got, official) < TOLERANCE


def test_magnitude_is_the_sum_of_squares_of_a_channel():
    """Worked out channel by channel."""
    model, ids, _ = golden("mixtral", "flexmoe_rank")
    got, _ = scores(model, ids, "magnitude")
    for layer in expert_layers(model):
        both, down = layer.module.gate_up_proj.detach(), layer.module.down_proj.detach()
        for e in range(layer.E):
            for j in range(layer.I):
                parts = (both[e, j], both[e, layer.I + j], down[e, :, j])
                want = sum(float(part.double().square().sum()) for part in parts)
                assert float(got[layer.index][e, j]) == pytest.approx(want)


@pytest.mark.parametrize("name", ["random", "random-experts"])
def test_random_follows_the_seed(name):
    model, ids, _ = golden("mixtral", "flexmoe_rank")
    layers, found = expert_layers(model), []
    for seed in (0, 0, 1):
        statistics = observe(model, ids[:1, :2], (), seed=seed)
        found.append(score_layers(all_methods()[name], layers, statistics))
    for i in found[0]:
        assert torch.equal(found[0][i], found[1][i]) and not torch.equal(found[0][i], found[2][i])
        assert float(found[0][i].min()) >= 0 and float(found[0][i].max()) <= 1
    assert not torch.equal(found[0][0], found[0][1])  # nor are two layers alike


def test_fisher_is_the_squared_derivative_by_a_mask():
    """For an expert with one token, Fisher's score is (d loss / d mask)^2 of a mask at 1."""
    model, ids, _ = golden("qwen3moe", "heapr")
    ids = ids[:1, :4]
    got = observe(model, ids, ["fisher_EI"])
    model.requires_grad_(False)
    masks = {}
    for layer in expert_layers(model):
        masks[layer.index] = torch.ones(layer.E, layer.I, requires_grad=True)
        layer.module.flexmoe_mask_EI = masks[layer.index]
    model.set_experts_implementation("flexmoe_mask")
    logits = model(ids).logits[:, :-1].flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").backward()
    for i, mask in masks.items():
        once = got[i]["count_E"] == 1
        assert once.any()
        want = mask.grad.double().square()[once]
        assert torch.allclose(got[i]["fisher_EI"][once], want, rtol=1e-4, atol=1e-12)


def test_a_token_counts_the_same_in_any_batch():
    model, ids, _ = golden("olmoe", "flexmoe_rank")
    needs = ["fisher_EI", "activation2_EI", "energy_max_EI"]
    one, four = observe(model, ids, needs, batch_size=1), observe(model, ids, needs, batch_size=4)
    for i in one:
        for name in needs:
            assert torch.allclose(one[i][name], four[i][name], rtol=1e-4, atol=1e-9), name


def test_thin_experts_are_named():
    model, ids, _ = golden("qwen3moe_cold", "heapr")
    statistics = observe(model, ids, [])
    thin = thin_experts(statistics)
    for i, stats in statistics.items():
        assert thin[i] == [e for e, n in enumerate(stats["count_E"].tolist()) if n < THIN]


MINE = '''
import flexmoe
@flexmoe.statistic("mine_EI", when="forward")
def mine(pairs):
    return pairs.h_SI.abs().float()
@flexmoe.method("mine", paper="none", needs=("mine_EI",))
def score(layer, stats):
    """Sum of absolute activations."""
    return stats["mine_EI"]
def undecorated(layer, stats):
    return 0
'''


def test_a_method_of_your_own_needs_no_change_of_the_package(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    method = find_method(f"{file}:score")
    model, ids, _ = golden("mixtral", "flexmoe_rank")
    got = score_layers(method, expert_layers(model), observe(model, ids, method.needs))
    assert all((score >= 0).all() and score.sum() > 0 for score in got.values())
    with pytest.raises(FlexmoeError, match="no method function 'undecorated'"):
        find_method(f"{file}:undecorated")


def test_a_file_is_executed_where_a_run_begins_and_then_no_more(tmp_path):
    file, config = tmp_path / "mine.py", CompressConfig(method=f"{tmp_path}/mine.py:score")
    file.write_text(MINE)
    check_config(config)
    before = find_method(config.method)
    assert before.sha256 == hashlib.sha256(MINE.encode()).hexdigest()
    file.write_text(f"{MINE}x = (")  # half an edit
    assert find_method(config.method) is before and config.needs == before.needs
    with pytest.raises(FlexmoeError, match=r"mine.py', line 12: '\(' was never"):
        check_config(config)
    file.write_text(f"{MINE}x = ()")
    check_config(config)
    assert find_method(config.method).sha256 != before.sha256


@pytest.mark.parametrize(
    ("old", "new", "taken"),
    [
        ('method("mine"', 'method("fisher"', "method 'fisher' stands in .*/methods/fisher.py"),
        ('method("mine"', 'method("mine"', "method 'mine' stands in .*/mine.py already"),
        ("copy_EI", "fisher_EI", "statistic 'fisher_EI' stands in .*/methods/fisher.py"),
    ],
)
def test_a_name_that_is_taken_is_refused(tmp_path, old, new, taken):
    (tmp_path / "mine.py").write_text(MINE)
    for _ in range(2):  # the same file again
        find_method(f"{tmp_path}/mine.py:score", anew=True)
    (tmp_path / "copy.py").write_text(MINE.replace("mine_EI", "copy_EI").replace(old, new))
    with pytest.raises(FlexmoeError, match=f"{taken}.*copy.py: give yours another name"):
        find_method(f"{tmp_path}/copy.py:score")
    assert METHODS["fisher"].score.__module__ == "flexmoe.methods.fisher"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fischer", "Did you mean 'fisher'"),
        ("./mine.py", "write ./mine.py:score"),
        ("./nowhere.py:score", "does not exist"),
    ],
)
def test_unknown_methods_are_refused(name, message):
    with pytest.raises(FlexmoeError, match=message):
        find_method(name)


@pytest.mark.parametrize(
    ("learned", "message"),
    [
        ({}, r"gave a NoneType for layer 0, expected a tensor \[6, 40\]"),
        ({0: [1.0]}, "gave a list for layer 0"),
        (None, "gave a NoneType, expected the scores of every layer"),
    ],
)
def test_bad_learned_scores_are_refused(learned, message):
    model, ids, _ = golden("mixtral", "flexmoe_rank")
    method = Method("bad", "none", (), lambda model, text: learned, learns=True)
    with pytest.raises(FlexmoeError, match=message):
        score_model(method, model, {}, Text(ids))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda layer, stats: torch.ones(2, 3), "expected \\[6, 40\\]"),
        (lambda layer, stats: torch.full((6, 40), torch.nan), "not finite"),
    ],
)
def test_wrong_scores_are_refused(score, message):
    model, ids, _ = golden("mixtral", "flexmoe_rank")
    statistics = observe(model, ids[:1], [])
    with pytest.raises(FlexmoeError, match=message):
        score_layers(Method("bad", "none", (), score), expert_layers(model), statistics)


def test_unknown_statistic_is_refused():
    model, ids, _ = golden("mixtral", "flexmoe_rank")
    with pytest.raises(FlexmoeError, match="Did you mean 'fisher_EI'"):
        observe(model, ids[:1], ["fisher_E"])
