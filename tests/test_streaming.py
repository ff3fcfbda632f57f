"""The pass layer by layer gives what that over the whole model gives, and survives a kill."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import zoo
from flexmoe.config import CompressConfig, check_config
from flexmoe.data import TINY, Windows
from flexmoe.errors import FlexmoeError
from flexmoe.evidence import gather
from flexmoe.family import load_stock
from flexmoe.memory import held
from flexmoe.methods import all_methods
from flexmoe.observe import observe
from flexmoe.pipeline import compress
from flexmoe.resume import Work
from flexmoe.streamed import fit, streaming
from flexmoe.streamed.fit import check_memory, gather_within
from flexmoe.streamed.layer_loader import LayerLoader
from flexmoe.streamed.streaming import gather_streamed

# The same float32 products, in micro-batches of another size and logits in chunks; relative, and
# to a millionth of the largest value of the layer. Seen on all 61 architectures: up to 3e-5 with
# two layers, 1e-4 with four.
TOLERANCE = 3e-4
CPU = torch.device("cpu")
NAMES = ("fisher_EI", "taylor_EI", "energy_sum_EI", "energy_max_EI")
# plain; transposed, interleaved and biased; no gate, layers without experts; outputs that are
# tuples; hyper-connections and token ids; shared caches, two kinds of layer; no logits_to_keep
ARCHITECTURES = (
    "qwen3_moe", "gpt_oss", "nemotron_h", "zaya", "glm_moe_dsa", "deepseek_v4", "gemma4_text",
    "qwen3_omni_moe_thinker",
)  # fmt: skip


def windows(number=5, length=12):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 60, (number, length), generator=generator)
    source = (torch.arange(number) % 2).long()
    return Windows(ids, "", ("even", "odd"), source)


def saved(folder):
    return Work(folder / "made", {}).stage("observe")


def streamed(path, folder, names=NAMES, **settings):
    settings = {"batch_size": 2, "micro_batch": 1, "chunk": 5} | settings
    with LayerLoader(path, CPU, torch.float32) as loader:
        return gather_streamed(loader, windows(), names, saved=saved(folder), **settings)


def checkpoint(name, path):
    zoo.tiny_model(name).save_pretrained(path)
    return path


def largest_difference(got, want):
    worst = 0.0
    for i, stats in want.items():
        assert torch.equal(got[i]["count_E"], stats["count_E"])
        assert (got[i].tokens, got[i].batches) == (stats.tokens, stats.batches)
        for name in stats.values.keys() - {"count_E"}:
            a, b = got[i][name], stats[name]
            worst = max(worst, float(((a - b).abs() / (b.abs() + 1e-6 * b.abs().max())).max()))
    return worst


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_statistics_are_those_of_the_whole_model(name, tmp_path):
    path = checkpoint(name, tmp_path / "model")
    found = streamed(path, tmp_path)
    model = load_stock(path, device="cpu", dtype=torch.float32)
    for source, place in (("even", 0), ("odd", 1)):
        ids = windows().ids[windows().source_n == place]
        want = observe(model, ids, NAMES, batch_size=2)
        assert found.sources[source].keys() == want.keys()
        assert largest_difference(found.sources[source], want) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, None])
@pytest.mark.parametrize("name", ["gpt_oss", "jamba", "qwen3_vl_moe"])
def test_weights_are_those_that_transformers_loads(name, dtype, tmp_path):
    zoo.tiny_model(name).to(dtype or torch.bfloat16).save_pretrained(tmp_path)
    config, named = tmp_path / "config.json", '"dtype": "bfloat16",' * (name == "jamba")
    config.write_text(config.read_text().replace(named, ""))  # without it weights say which
    want = load_stock(tmp_path, device="cpu", dtype=dtype or "auto").state_dict()
    seen, expected = set(), 0
    with LayerLoader(tmp_path, CPU, dtype) as loader:
        for i in range(len(loader.layers)):
            with loader.resident(i):
                there = {n: t for n, t in loader.model.state_dict().items() if not t.is_meta}
                for key, tensor in there.items():
                    assert tensor.dtype == want[key].dtype and torch.equal(tensor, want[key]), key
                seen |= there.keys()
                others = [t for n, t in there.items() if f"{loader.stack}." in n]
                assert len(others) == len(loader.layers[i].state_dict())  # one layer at a time
                expected += loader.bytes_of[i]
        assert seen == want.keys()
        assert expected + loader.bytes_outside >= sum(
            t.nbytes for t in {t.data_ptr(): t for t in want.values()}.values()
        )
    assert all(tensor.is_meta for tensor in loader.model.state_dict().values())


def test_router_logits_that_config_json_asks_for_are_not_needed(tmp_path):
    """As that of a fine-tuned model may: for a loss that is no part of the pass."""
    model = zoo.tiny_model("qwen3_moe")
    model.config.output_router_logits = True
    model.save_pretrained(tmp_path / "model")
    got = streamed(tmp_path / "model", tmp_path).sources["even"]
    want = observe(model, windows().ids[windows().source_n == 0], NAMES, batch_size=2)
    assert largest_difference(got, want) < TOLERANCE


def test_forward_statistics_need_no_second_sweep(tmp_path):
    path = checkpoint("qwen3_moe", tmp_path / "model")
    done = []
    names = NAMES[2:]
    found = streamed(path, tmp_path, names, track=lambda items, text: done.extend(items) or items)
    assert done == [0, 1]
    model = load_stock(path, device="cpu", dtype=torch.float32)
    want = observe(model, windows().ids, names, batch_size=2)
    got = found.mixed()
    for i in want:
        want[i].batches = got[i].batches  # two sources: a batch more
    assert largest_difference(got, want) < TOLERANCE


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [1, 3, 4])  # forward, the head, backward
def test_a_killed_pass_goes_on_from_the_last_finished_layer(after, tmp_path, monkeypatch):
    path = checkpoint("qwen3_moe", tmp_path / "model")
    whole = streamed(path, tmp_path / "unbroken").tensors()

    def killed(steps, text):
        for number, step in enumerate(steps):
            if number == after:
                raise Killed
            yield step

    with pytest.raises(Killed):
        streamed(path, tmp_path / "killed", track=killed)
    run, runs = streaming.run_layer, []

    def killed_midway(*arguments, **settings):
        runs.append(1)
        if len(runs) == 3:
            raise Killed
        return run(*arguments, **settings)

    with monkeypatch.context() as broken:  # and again in the middle of the next layer
        broken.setattr(streaming, "run_layer", killed_midway)
        with pytest.raises(Killed):
            streamed(path, tmp_path / "killed")
    left = []
    again = streamed(
        path, tmp_path / "killed", track=lambda items, text: left.extend(items) or items
    ).tensors()
    assert len(left) == 5 - after
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_files_go_when_nothing_reads_them_any_more(tmp_path):
    path = checkpoint("qwen3_moe", tmp_path / "model")
    streamed(path, tmp_path)
    left = sorted(f.name for f in (tmp_path / "made.work" / "activations").iterdir())
    assert left == ["gradient--1", "output-1"] or left == ["output-1"]


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried", "can't allocate memory: you"])
def test_smaller_micro_batches_instead_of_an_out_of_memory_death(message, tmp_path, monkeypatch):
    path = checkpoint("qwen3_moe", tmp_path / "model")
    want = streamed(path, tmp_path / "whole", micro_batch=2).mixed()
    run, sizes = streaming.run_layer, []

    def short(loader, index, given, ids, **settings):
        sizes.append(len(ids))
        output = run(loader, index, given, ids, **settings)
        if len(ids) > 1 and len(sizes) > 8:  # after the layer has been observed
            raise RuntimeError(message)
        return output

    monkeypatch.setattr(streaming, "run_layer", short)
    got = streamed(path, tmp_path / "short", micro_batch=2).mixed()
    assert 1 in sizes and sizes[-1] == 1
    assert largest_difference(got, want) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [  # residuals of several layers before; keys and values of another layer
        ("inkling2_text", {"n_layers_per_attn_res_block": 1}, "layers before that one"),
        (
            "gemma4_text",
            {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 2},
            "finds nothing",
        ),
    ],
)
def test_models_whose_layers_need_more_are_refused(name, config, reason, tmp_path, monkeypatch):
    monkeypatch.setitem(zoo.COMMON, "num_hidden_layers", 4)
    monkeypatch.setitem(zoo.COMMON, "mlp_layer_types", ["sparse"] * 4)
    monkeypatch.setitem(zoo.EXTRA, name, zoo.EXTRA.get(name, {}) | config)
    path = checkpoint(name, tmp_path / "model")
    with pytest.raises(FlexmoeError, match=f"cannot be read layer by layer.*{reason}"):
        streamed(path, tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.1.mlp.experts.down_proj", "down_proj has 1 values that are NaN"),
        ("lm_head.weight", "decoder layer 1 gives .* not finite"),
    ],
)
def test_weights_that_are_not_finite_are_named(name, message, tmp_path):
    model = zoo.tiny_model("qwen3_moe")
    model.get_parameter(name).data.view(-1)[0] = torch.nan
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FlexmoeError, match=message):
        streamed(tmp_path / "model", tmp_path)


def test_a_missing_weight_is_named(tmp_path):
    model = zoo.tiny_model("qwen3_moe")
    state = model.state_dict()
    del state["model.layers.1.self_attn.o_proj.weight"]
    model.save_pretrained(tmp_path / "model", state_dict=state)
    with pytest.raises(FlexmoeError, match=r"nothing .* for model.layers.1.self_attn"):
        streamed(tmp_path / "model", tmp_path)


def test_too_little_memory_is_said_before_and_the_figure_is_enough(tmp_path):
    path = TINY / "model"
    loader = LayerLoader(path, CPU, torch.float32)
    with pytest.raises(FlexmoeError, match="Give --memory more than") as error:
        check_memory(loader, held(CPU) // 2)
    assert "embeddings" in str(error.value)
    check_memory(loader, 2 * held(CPU))
    ids = torch.randint(3, 4000, (4, 64), generator=torch.Generator().manual_seed(0))
    some = Windows(ids, "", ("a",), torch.zeros(4))
    with loader, pytest.raises(FlexmoeError, match="one window of 64 tokens"):
        gather_within(
            held(CPU), loader, some, NAMES, batch_size=4, saved=saved(tmp_path / "little")
        )
    with loader:
        found = gather_within(
            2 * held(CPU), loader, some, NAMES, batch_size=4, saved=saved(tmp_path / "enough")
        )
    assert found.sources["a"][0].tokens == 256


def test_a_batch_of_any_size_goes_whole_where_it_fits(tmp_path):
    path, needs = checkpoint("qwen3_moe", tmp_path / "model"), ["subset_loss_C"]
    with LayerLoader(path, CPU, torch.float32) as loader:
        stage = saved(tmp_path)
        gather_within(2 * held(CPU), loader, windows(), needs, batch_size=3, saved=stage)
    _, sizes = stage.work.stage("sizes").load()
    assert int(sizes["micro_batch"]) == 3


def test_too_little_disk_is_said_before_the_pass(tmp_path, monkeypatch):
    usage = fit.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda path: usage)
    path = checkpoint("qwen3_moe", tmp_path / "model")
    with (
        LayerLoader(path, CPU, torch.float32) as loader,
        pytest.raises(FlexmoeError, match="fewer --samples"),
    ):
        gather_within(2 * held(CPU), loader, windows(), NAMES, batch_size=2, saved=saved(tmp_path))
    assert not (tmp_path / "made.work" / "rehearsal").exists()


def test_compress_within_memory_gives_the_same_plan(tmp_path):
    config = CompressConfig(
        samples=4, seq_len=32, batch_size=2, allocate="global", memory=8 * 2**30, device="cpu"
    )
    got = compress("tiny", tmp_path / "streamed", config)
    want = compress("tiny", tmp_path / "whole", dataclasses.replace(config, memory=None))
    # channels with scores that are equal but for rounding may change places
    same = [float((got.order[i] == want.order[i]).float().mean()) for i in want.order]
    assert min(same) > 0.99
    assert all(torch.equal(got.width[i], want.width[i]) for i in want.width)
    assert not (tmp_path / "streamed.work").exists()


def test_a_source_without_a_window_is_left_out(tmp_path):
    path = checkpoint("qwen2_moe", tmp_path / "base")
    place = torch.tensor([0, 2, 2, 0, 2])
    some = dataclasses.replace(windows(), sources=("a", "none", "b"), source_n=place)
    model = load_stock(path, device="cpu", dtype=torch.float32)
    with LayerLoader(path, CPU, torch.float32) as loader:
        got = gather_streamed(loader, some, NAMES, saved=saved(tmp_path / "work"))
    assert list(got.sources) == list(gather(model, some, NAMES).sources) == ["a", "b"]


def test_what_looks_at_whole_batches_gets_whole_batches(tmp_path, monkeypatch):
    path = checkpoint("qwen3_moe", tmp_path / "base")
    needs = ["weight_slope_EI", "subset_loss_C"]
    model = load_stock(path, device="cpu", dtype=torch.float32)
    got = streamed(path, tmp_path / "work", needs, batch_size=2, micro_batch=1).mixed()
    for i, stats in gather(model, windows(), needs, batch_size=2).mixed().items():
        for name in needs:
            assert torch.allclose(got[i][name], stats[name], rtol=1e-3, atol=1e-9), name
    sizes = {"micro_batch": torch.tensor(1), "chunk": torch.tensor(5)}
    monkeypatch.setattr("flexmoe.streamed.fit.pick_sizes", lambda *_: sizes)
    with LayerLoader(path, CPU, torch.float32) as loader:
        with pytest.raises(FlexmoeError, match=r"of 2 windows 1 fit .* use --batch-size 1"):
            how = {"batch_size": 2, "saved": saved(tmp_path / "other")}
            gather_within(2 * held(CPU), loader, windows(), needs, **how)


def test_every_statistic_of_every_method_in_all_their_passes(tmp_path):
    """Of the router, the residual stream and those that come after others, too."""
    path = checkpoint("qwen3_moe", tmp_path / "base")
    needs = sorted({name for method in all_methods().values() for name in method.needs})
    model = load_stock(path, device="cpu", dtype=torch.float32)
    got = streamed(path, tmp_path / "work", needs, micro_batch=2)
    want = gather(model, windows(), needs, batch_size=2)
    for source, statistics in want.sources.items():
        for i, stats in statistics.items():
            mine = got.sources[source][i]
            assert mine.values.keys() == stats.values.keys() and mine.tokens == stats.tokens
            for name, value in stats.values.items():
                assert torch.allclose(mine[name], value, rtol=1e-3, atol=1e-9), name


def test_a_method_that_reads_weights_and_no_text(tmp_path):
    settings = {"method": "magnitude", "allocate": "global", "device": "cpu"}
    got = compress("tiny", tmp_path / "a", CompressConfig(**settings, memory=8 * 2**30))
    want = compress("tiny", tmp_path / "b", CompressConfig(**settings))
    assert all(torch.equal(got.order[i], want.order[i]) for i in want.order)
    assert [r.experts_per_token for r in got.layers.values()] == [
        r.experts_per_token for r in want.layers.values()
    ]


@pytest.mark.parametrize("allocator", ["learned", "actions"])
def test_learning_is_refused_with_a_limit_of_memory(allocator):
    with pytest.raises(FlexmoeError, match="--allocate global"):
        check_config(CompressConfig(allocate=allocator, memory=2**30))
