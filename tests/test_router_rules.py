"""Router rules: what they compute, in memory and exported; what is refused."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import flexmoe
from flexmoe import CompressConfig, FlexmoeError, compress, set_budget
from flexmoe.allocate import allocate_experts
from flexmoe.checkpoint import Checkpoint
from flexmoe.evidence import Evidence
from flexmoe.experts import expert_layers
from flexmoe.exporter import export
from flexmoe.family import attach
from flexmoe.plan import LayerRecord, Plan, Recipe
from flexmoe.prepare import router_groups
from flexmoe.reweigh import reweigh
from flexmoe.routing.counts import builder, find_counts
from flexmoe.statistics import LayerStatistics
from helpers import LOGIT_TOLERANCE, difference, ids_of, load, logits
from zoo import model_class, tiny_config, tiny_model

E, HALF = 8, 0.5


def expert_plan(model, source, budgets=(0.0, HALF), router="keep", groups=1, constant=None):
    """A plan of whole experts by random scores."""
    generator = torch.Generator().manual_seed(1)
    records = {
        layer.index: LayerRecord(**vars(layer.shape), experts_per_token=2)
        for layer in expert_layers(model)
    }
    score = {i: torch.rand(r.experts, generator=generator) for i, r in records.items()}
    shapes = {i: r.shape for i, r in records.items()}
    return Plan(
        layers=records,
        order={i: torch.arange(r.channels).expand(r.experts, -1) for i, r in records.items()},
        width=allocate_experts("layer", shapes, score, budgets, groups),
        budgets=budgets,
        quantum=max(r.channels for r in records.values()),
        recipe=Recipe(
            base_model=str(source),
            model_type=model.config.model_type,
            method="random-experts",
            allocate="layer",
            unit="expert",
            router=router,
            router_groups=groups,
            data="",
            data_sha256="",
            samples=0,
            seq_len=0,
            seed=0,
        ),
        bytes_full=1,
        bytes_per_parameter=4,
        constant=constant or {},
    )


def saved(model, folder):
    """The model as a checkpoint with an empty tokenizer's worth of files."""
    model.save_pretrained(folder)
    return folder


# one of each kind of router: softmax, sigmoid with bias in it or in the block, bias of a linear
# layer, a router outside the block, no gate, nested config, its own way to choose
ARCHITECTURES = [
    "qwen3_moe", "mixtral", "olmoe", "deepseek_v3", "glm4_moe", "minimax_m2", "lfm2_moe", "gpt_oss",
    "gemma4_text", "nemotron_h", "qwen3_vl_moe", "phimoe", "granitemoe", "ernie4_5_moe",
]  # fmt: skip


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_export_is_what_was_evaluated_and_loads_in_the_stock_class(kind, tmp_path):
    model = tiny_model(kind)
    source, ids = saved(model, tmp_path / "base"), ids_of(model)
    before = logits(model, ids)
    plan = expert_plan(model, source, router="remove")
    plan.save(tmp_path / "plan")
    attach(model, plan, ranked=True)
    figures = set_budget(model, HALF)
    virtual = logits(model, ids)
    assert difference(virtual, before) > 0.01

    done = export(tmp_path / "plan", tmp_path / "out", pruned=HALF, layout="uniform", base=source)
    written = load(tmp_path / "out", model)
    assert [layer.E for layer in expert_layers(written)] == [E // 2] * len(plan.layers)
    assert difference(logits(written, ids), virtual) < LOGIT_TOLERANCE
    assert done.checked == E // 2 * len(plan.layers)
    assert done.routed_parameters == figures.routed_parameters
    stored = sum(layer.shape.parameters for layer in expert_layers(written))
    assert stored == figures.routed_parameters

    set_budget(model, 0)  # and back, bit for bit
    assert torch.equal(logits(model, ids), before)


def test_removing_rows_is_minus_infinity_before_the_softmax():
    model = tiny_model("mixtral")
    plan, ids = expert_plan(model, "base", router="remove"), ids_of(model)
    gone = {i: width_E == 0 for i, width_E in plan.widths(HALF).items()}
    for layer in expert_layers(model):

        def route(router, args, out, gone_E=gone[layer.index]):
            logits_TE = out[0].masked_fill(gone_E, -torch.inf)
            weight_TK, index_TK = logits_TE.softmax(-1).topk(2)
            return logits_TE, weight_TK / weight_TK.sum(-1, keepdim=True), index_TK

        layer.model.get_submodule(layer.name.rpartition(".")[0]).gate.register_forward_hook(route)
    want = logits(model, ids)

    model = tiny_model("mixtral")
    attach(model, plan, ranked=True)
    set_budget(model, HALF)
    assert difference(logits(model, ids), want) < LOGIT_TOLERANCE


def test_constants_stand_for_experts_that_are_gone():
    model = tiny_model("qwen3_moe")
    ids, before = ids_of(model), logits(tiny_model("qwen3_moe"), ids_of(model))
    constant = {layer.index: torch.randn(layer.E, layer.H) for layer in expert_layers(model)}
    plan = expert_plan(model, "base", constant=constant)
    attach(model, plan, ranked=True)
    set_budget(model, HALF, "constant")
    got = logits(model, ids)
    # the oracle: each expert that is gone replaced by a function without an input
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    def forward(module, x_TH, index_TK, weight_TK):
        out = torch.zeros_like(x_TH)
        for t in range(len(x_TH)):
            for e, w in zip(index_TK[t].tolist(), weight_TK[t], strict=True):
                if module.flexmoe_width_E[e]:
                    gate, up = (module.gate_up_proj[e] @ x_TH[t]).chunk(2)
                    y = module.down_proj[e] @ (module.act_fn(gate) * up)
                else:
                    y = module.flexmoe_constant_EH[e]
                out[t] += w * y
        return out

    ALL_EXPERTS_FUNCTIONS.register("flexmoe_test_constant", forward)
    model.set_experts_implementation("flexmoe_test_constant")
    assert difference(got, logits(model, ids)) < LOGIT_TOLERANCE
    set_budget(model, 0)
    assert torch.equal(logits(model, ids), before)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "gpt_oss", "nemotron_h"])
def test_an_export_with_constants_is_what_was_evaluated(kind, tmp_path):
    """Loaded as any checkpoint, saved again, loaded again."""
    model = tiny_model(kind)
    source, ids = saved(model, tmp_path / "base"), ids_of(model)
    torch.manual_seed(0)
    constant = {x.index: torch.randn(x.E, x.H) for x in expert_layers(model)}
    plan = expert_plan(model, source, router="constant", constant=constant)
    plan = dataclasses.replace(plan, bytes_full=Checkpoint(source).bytes)
    plan.save(tmp_path / "plan")
    attach(model, plan, ranked=True)
    figures = set_budget(model, HALF)
    virtual = logits(model, ids)
    for layout in ("uniform", "masked"):
        with pytest.raises(FlexmoeError, match=f"layout {layout} is a stock checkpoint"):
            export(tmp_path / "plan", tmp_path / "x", pruned=HALF, layout=layout, base=source)
    done = export(tmp_path / "plan", tmp_path / "out", pruned=HALF, layout="ragged", base=source)
    assert done.bytes == figures.bytes and done.routed_parameters == figures.routed_parameters
    written = load(tmp_path / "out", model)
    assert difference(logits(written, ids), virtual) < LOGIT_TOLERANCE
    written.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(tmp_path / "again", model), ids), logits(written, ids))
    half = type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    kept = {name: t for name, t in half.named_buffers() if name.endswith("flexmoe_constant_EH")}
    assert len(kept) == len(constant) and all(t.dtype == torch.float32 for t in kept.values())
    kept_out = export(
        tmp_path / "plan", tmp_path / "kept", pruned=HALF, layout="ragged", router="keep",
        base=source,
    )  # fmt: skip
    assert kept_out.bytes < done.bytes
    assert difference(logits(load(tmp_path / "kept", model), ids), virtual) > 0.01


def test_an_export_whose_constants_are_missing_is_refused(tmp_path):
    """Of all layers or of one: transformers alone would go on with what stands in memory."""
    model = tiny_model("qwen3_moe")
    source = saved(model, tmp_path / "base")
    constant = {x.index: torch.ones(x.E, x.H) for x in expert_layers(model)}
    expert_plan(model, source, router="constant", constant=constant).save(tmp_path / "plan")
    out = tmp_path / "out"
    export(tmp_path / "plan", out, pruned=HALF, layout="ragged", base=source)
    (file,) = out.glob("model*.safetensors")
    tensors = load_file(file)
    ours = sorted(name for name in tensors if name.endswith("flexmoe_constant_EH"))
    assert len(ours) == len(constant) == 2
    for lost, why in (
        (ours[1:], "for 1 of 2 layers \\(first: layer 1\\)"),
        (ours, "for 2 of 2 layers \\(first: layer 0\\)"),
    ):
        left = {name: tensor for name, tensor in tensors.items() if name not in lost}
        save_file(left, file, metadata={"format": "pt"})
        with pytest.raises(FlexmoeError, match=why):
            load(out, model)


@pytest.fixture
def grouped():
    """A DeepSeek-V3 that chooses 2 of 8 experts within the better one of 2 groups."""
    config = tiny_config("deepseek_v3")
    config.n_group, config.topk_group = 2, 1
    torch.manual_seed(0)
    model = model_class("deepseek_v3")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim > 1 else parameter.uniform_(0.8, 1.2)
    return model


def test_groups_lose_equally_many(grouped, tmp_path):
    counts = find_counts(grouped.config.to_dict(), builder(grouped))
    assert counts.groups == 2 and counts.K == 2 and counts.E == E
    source, ids = saved(grouped, tmp_path / "base"), ids_of(grouped)
    plan = expert_plan(grouped, source, groups=2, router="remove")
    for width_E in plan.widths(HALF).values():
        assert (width_E > 0).view(2, -1).sum(1).tolist() == [2, 2]
    plan.save(tmp_path / "plan")
    attach(grouped, plan, ranked=True)
    set_budget(grouped, HALF)
    virtual = logits(grouped, ids)
    export(tmp_path / "plan", tmp_path / "out", pruned=HALF, layout="uniform", base=source)
    assert difference(logits(load(tmp_path / "out", grouped), ids), virtual) < LOGIT_TOLERANCE

    uneven = expert_plan(grouped, source)
    uneven.width[1][1] = torch.tensor([16] * 4 + [0] * 4)
    attach(grouped, uneven, ranked=True)
    with pytest.raises(FlexmoeError, match="within 2 groups of experts, which must stay equally"):
        set_budget(grouped, HALF, "remove")

    config = CompressConfig(method="reap", router="remove", pruned=(HALF,))
    assert router_groups(grouped, config) == 2
    for change in ({"allocate": "global"}, {"sequential": 0.4}):
        with pytest.raises(FlexmoeError, match=r"equally large: with --router remove .*--[as]"):
            router_groups(grouped, dataclasses.replace(config, **change))


def test_a_new_mixture_keeps_groups_equal(grouped, tmp_path, monkeypatch):
    plan = expert_plan(grouped, "base", groups=2, router="remove")
    replaced = plan.recipe.model_copy(update={"method": "frequency"})
    dataclasses.replace(plan, recipe=replaced).save(tmp_path / "plan")
    statistics = {
        i: LayerStatistics({"count_E": torch.rand(E, dtype=torch.float64)}, 8) for i in plan.layers
    }
    kept = Evidence({"a": statistics}, "")
    monkeypatch.setattr("flexmoe.reweigh.Evidence.load", lambda folder, sha256: kept)
    monkeypatch.setattr("flexmoe.reweigh.meta_model", lambda folder: grouped)
    with pytest.raises(FlexmoeError, match="equally large: with --router remove use --allocate l"):
        reweigh(tmp_path / "plan", "a", tmp_path / "out")
    new, _ = reweigh(tmp_path / "plan", "a", tmp_path / "out", allocator="layer")
    assert all((w[1] > 0).view(2, -1).sum(1).tolist() == [2, 2] for w in new.width.values())


def test_a_token_is_sent_to_no_more_experts_than_there_are(tmp_path):
    model = tiny_model("qwen3_moe")
    source, ids = saved(model, tmp_path / "base"), ids_of(model)
    plan = expert_plan(model, source, (0.0, 0.875), router="remove")
    plan.save(tmp_path / "plan")
    attach(model, plan, ranked=True)
    assert set_budget(model, 0.875).active_parameters == plan.member(0.875).routed_parameters
    virtual = logits(model, ids)
    export(tmp_path / "plan", tmp_path / "out", pruned=0.875, layout="uniform", base=source)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts_per_tok"] == 1
    assert config["num_experts"] == config["num_local_experts"] == 1  # both spellings
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert written.config.num_experts == 1
    assert difference(logits(written, ids), virtual) < LOGIT_TOLERANCE
    everything = expert_plan(model, source, (0.0, 1.0))
    attach(model, everything, ranked=True)
    with pytest.raises(FlexmoeError, match="would keep no expert"):
        set_budget(model, 1.0, "remove")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("zaya", "depends on their number in another way"),
        ("deepseek_v4", "sends tokens to experts by their numbers"),
    ],
)
def test_what_cannot_be_removed_is_refused(kind, why, tmp_path):
    model = tiny_model(kind)
    source = saved(model, tmp_path / "base")
    plan = expert_plan(model, source)
    attach(model, plan, ranked=True)
    with pytest.raises(FlexmoeError, match=why):
        set_budget(model, HALF, "remove")
    plan.save(tmp_path / "plan")
    with pytest.raises(FlexmoeError, match=why):
        export(
            tmp_path / "plan", tmp_path / "out", pruned=HALF, layout="uniform", router="remove",
            base=source,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_rules_that_do_not_fit_are_refused(tmp_path):
    small = {"samples": 2, "seq_len": 32, "pruned": (0.5,)}
    with pytest.raises(FlexmoeError, match="Did you mean 'remove'"):
        compress("tiny", tmp_path / "x", CompressConfig(method="reap", router="removed", **small))
    with pytest.raises(FlexmoeError, match="'remove' is of whole experts"):
        compress("tiny", tmp_path / "x", CompressConfig(method="heapr", router="remove", **small))
    compress("tiny", tmp_path / "family", CompressConfig(method="reap", **small))
    keep = {"pruned": 0.5, "layout": "uniform"}
    with pytest.raises(FlexmoeError, match="add --router remove"):
        export(tmp_path / "family", tmp_path / "x", **keep)
    with pytest.raises(FlexmoeError, match="keeps the router as it is"):
        export(tmp_path / "family", tmp_path / "x", pruned=0.5, layout="ragged", router="remove")
    with pytest.raises(FlexmoeError, match="compress with --router constant"):
        export(tmp_path / "family", tmp_path / "x", **keep, router="constant")
    model = flexmoe.load("tiny")
    with pytest.raises(FlexmoeError, match="no budgets"):
        set_budget(model, 0.5, "remove")


def test_a_family_says_its_rule_and_opens_with_it(tmp_path):
    small = {"samples": 4, "seq_len": 64, "pruned": (0.5,)}
    families = {}
    for rule in ("keep", "remove", "constant"):
        config = CompressConfig(method="mone", router=rule, **small)
        plan = compress("tiny", tmp_path / rule, config)
        assert plan.recipe.router == rule
        assert bool(plan.constant) == (rule == "constant")
        families[rule] = flexmoe.load(tmp_path / rule, 0.5)
    ids = ids_of(families["keep"])
    found = {rule: logits(model, ids) for rule, model in families.items()}
    assert difference(found["keep"], found["remove"]) > 0.01
    assert difference(found["keep"], found["constant"]) > 0.01
    set_budget(families["remove"], 0.5, "keep")  # the same plan, the other rule
    assert difference(logits(families["remove"], ids), found["keep"]) < LOGIT_TOLERANCE
    export(tmp_path / "remove", tmp_path / "out", pruned=0.5, layout="uniform")
    assert AutoConfig.from_pretrained(tmp_path / "out").num_experts == 8
    assert "--router remove" in (tmp_path / "out" / "README.md").read_text()
