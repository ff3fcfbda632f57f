"""What holds for every method that is registered, whatever it scores and looks at."""

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from flexmoe.around import router_weights
from flexmoe.data import calibration_windows
from flexmoe.experts import expert_layers
from flexmoe.headers import resolve
from flexmoe.methods import Text, all_methods, score_model
from flexmoe.observe import observe, watched
from flexmoe.reference import ROUTER
from flexmoe.statistics import beside, empty_statistics, find_statistics, passes
from golden_data import golden

METHODS = all_methods()
NAMES = sorted(METHODS)
RANDOM = ("random", "random-experts")  # scores of places, not of what stands there


def example(name, cold=True):
    """A small random model and windows that leave an expert without a token, if asked for."""
    if name == "naee":  # tries all subsets, so few experts; and few tokens, so that one gets none
        model, ids, _ = golden("mixtral", "naee")
        return model, ids[:2, :2] if cold else ids
    model, ids, _ = golden("qwen3moe_cold", "heapr")
    return model, ids


def with_reference(name, model, statistics):
    """The router of a second checkpoint, for those that compare with one: rows of other norms."""
    for layer in expert_layers(model) if METHODS[name].reference else ():
        (rows,) = router_weights(layer).values()
        statistics[layer.index].values[ROUTER] = rows.detach().double().square()
    return statistics


def seen(name, model, ids):
    return with_reference(name, model, observe(model, ids, METHODS[name].needs, batch_size=4))


def scored(name, model, ids, statistics=None):
    statistics = seen(name, model, ids) if statistics is None else statistics
    return score_model(METHODS[name], model, statistics, Text(ids, batch_size=4))


def alike(got, want, i):
    scale = float(want.abs().max())
    assert torch.allclose(got, want, rtol=1e-3, atol=scale * 1e-6), f"layer {i}"


@pytest.mark.parametrize("name", NAMES)
def test_shape_device_determinism_and_experts_without_tokens(name):
    model, ids = example(name)
    statistics = seen(name, model, ids)
    assert any((stats["count_E"] == 0).any() for stats in statistics.values())
    first, again = scored(name, model, ids, statistics), scored(name, model, ids)
    for layer in expert_layers(model):
        score = first[layer.index]
        shape = (layer.E, layer.I) if METHODS[name].unit == "channel" else (layer.E,)
        assert score.shape == shape and score.dtype == torch.float64 and score.device.type == "cpu"
        assert torch.isfinite(score).all() and torch.equal(score, again[layer.index])
        assert len(score.unique()) > min(6, layer.E - 3)  # it tells experts apart
    assert not any(vars(layer.module).keys() & LEFT for layer in expert_layers(model))


LEFT = {"flexmoe_observer", "flexmoe_mask_EI", "flexmoe_load_E", "flexmoe_width_E"}


@pytest.mark.parametrize("name", [name for name in NAMES if name not in RANDOM])
def test_permuted_channels_and_experts_permute_the_scores(name):
    """Experts with the rows of their router; nothing else changes."""
    model, ids = example(name, cold=False)  # subsets tie where an expert has no tokens
    first, layers = scored(name, model, ids), expert_layers(model)
    for layer in layers:
        layer.permute_(torch.arange(layer.I - 1, -1, -1).expand(layer.E, layer.I))
    permuted = scored(name, model, ids)
    for i, score in first.items():
        alike(permuted[i], score.flip(1) if score.dim() == 2 else score, i)
    order = torch.randperm(layers[0].E, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for layer in layers:
            for weight in (*layer.parameters.values(), *router_weights(layer).values()):
                weight.copy_(weight[order])
    moved = scored(name, model, ids)
    for i, score in permuted.items():
        alike(moved[i], score[order], i)


@pytest.mark.parametrize("name", [name for name in NAMES if METHODS[name].needs])
def test_two_half_batches_merge_to_one(name):
    """Statistics of two halves of the windows, by batches of the same size, add up to those of all,
    also where some come in a second pass; and give the same scores."""
    model, ids = example(name)
    half = len(ids) // 2
    size = min(4, half)
    whole = observe(model, ids, METHODS[name].needs, batch_size=size)
    merged = {}
    for wanted in passes(METHODS[name].needs):
        parts = [empty_statistics(expert_layers(model), wanted) for _ in range(2)]
        with watched(model, wanted, merged) as look:
            for part, windows in zip(parts, (ids[:half], ids[half:]), strict=True):
                for batch in windows.split(size):
                    look(batch, part)
        for i, stats in parts[1].items():
            parts[0][i].merge(stats)
        merged = beside(merged, parts[0])
    for i, stats in whole.items():
        assert (stats.tokens, stats.batches) == (merged[i].tokens, merged[i].batches)
        for statistic in find_statistics(METHODS[name].needs):
            got, want = merged[i][statistic.name], stats[statistic.name]
            assert torch.allclose(got.double(), want.double(), rtol=1e-6), statistic.name
    got = scored(name, model, ids, with_reference(name, model, merged))
    for i, score in scored(name, model, ids, with_reference(name, model, whole)).items():
        alike(got[i], score, i)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_count(side, tmp_path):
    """A tokenizer that pads and cuts gives the same windows as one that does neither: all of them
    full, of text alone. So no method of any kind sees a token of padding."""
    plain = Tokenizer.from_file(str(resolve("tiny") / "tokenizer.json"))
    text = tmp_path / "short.txt"
    text.write_text("\n\n".join(f"Line {n} of a short text." for n in range(400)))
    marks = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}

    def windows(backend, **more):
        wrapped = PreTrainedTokenizerFast(tokenizer_object=backend, **marks, **more)
        return calibration_windows(str(text), wrapped, samples=8, seq_len=48, seed=0).ids

    want = windows(plain)
    padding = Tokenizer.from_str(plain.to_str())
    padding.enable_padding(direction=side, length=64, pad_id=7, pad_token="<|pad|>")
    padding.enable_truncation(max_length=5)
    got = windows(padding, padding_side=side)
    assert torch.equal(got, want) and want.shape == (8, 48)
    model, _ = example("reap")
    stats = observe(model, got % 60, ["count_E"])
    for seen_here in stats.values():  # each token of a window counts, at each of its experts
        assert seen_here.tokens == got.numel()
        assert int(seen_here["count_E"].sum()) == got.numel() * seen_here.experts_per_token
