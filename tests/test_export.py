"""Ranking and exporting: what is on disk computes the same as masking does."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.exporter import export, rank_checkpoint
from flexmoe.plan import Plan
from flexmoe.trace import check_weights, fingerprint, trace
from helpers import (
    LOGIT_TOLERANCE,
    difference,
    ids_of,
    load,
    logits,
    masked_logits,
    random_plan,
    tensors,
)
from zoo import DECODERS, model_class, tiny_model

EXPORT = sys.modules[export.__module__]
FAMILIES = ("mixtral", "olmoe", "qwen2_moe", "deepseek_v2", "gpt_oss")
TWO_IN_A_LAYER = {"ernie4_5_vl_moe"}  # two groups of routed experts in a layer: refused


@dataclass
class Case:
    """A checkpoint of several shards, a plan for it and the family made of both."""

    model: PreTrainedModel
    source: Path
    plan: Plan
    plan_folder: Path
    family: Path
    ids: Tensor


def make(model_type: str, root: Path) -> Case:
    model = tiny_model(model_type)
    source, alone, family = root / "source", root / "plan", root / "family"
    model.save_pretrained(source, max_shard_size="50KB")
    (source / "tokenizer.json").write_text('{"ä": 1}\n')
    (source / "assets").mkdir()
    (source / "assets" / "note.txt").write_text("kept")
    plan = random_plan(model, source)
    plan.save(alone)
    family.mkdir()
    rank_checkpoint(source, plan, family)
    plan.save(family, ranked=True)
    return Case(model, source, plan, alone, family, ids_of(model))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {name: make(name, tmp_path_factory.mktemp(name)) for name in FAMILIES}


@pytest.mark.parametrize("name", FAMILIES)
def test_ranked_family_is_the_same_function(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    ranked = load(case.family, case.model)
    want = logits(case.model, case.ids)
    assert difference(logits(ranked, case.ids), want) < LOGIT_TOLERANCE
    first, other = expert_layers(case.model)[0], expert_layers(ranked)[0]
    first.permute_(case.plan.order[first.index])
    for parameter, values in first.parameters.items():
        assert torch.equal(values, other.parameters[parameter])
    first.permute_(case.plan.order[first.index].argsort(1))


@pytest.mark.parametrize("name", FAMILIES)
def test_ranked_family_keeps_shards_names_and_other_files(cases: dict[str, Case], name) -> None:
    case = cases[name]
    before, after = Checkpoint(case.source), Checkpoint(case.family)
    assert len(before.files) > 1
    assert before.tensors == after.tensors
    same = ["config.json", "generation_config.json", "tokenizer.json", "assets/note.txt"]
    for file in same:
        assert (case.source / file).read_bytes() == (case.family / file).read_bytes()
    index = "model.safetensors.index.json"
    maps = [json.loads((p / index).read_text())["weight_map"] for p in (case.source, case.family)]
    assert maps[0] == maps[1]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", ["ragged", "masked"])
@pytest.mark.parametrize("alone", [False, True], ids=["family", "plan"])
def test_export_equals_masking(
    cases: dict[str, Case], name: str, layout: str, alone: bool, tmp_path: Path
) -> None:
    case, out = cases[name], tmp_path / "out"
    seen: list[str] = []

    def track(items, description):  # type: ignore[no-untyped-def]
        seen.append(description.split()[0])
        return items

    report = export(
        case.plan_folder if alone else case.family,
        out,
        pruned=0.4,
        layout=layout,
        track=track,
    )
    want = masked_logits(case.model, case.plan, 0.4, case.ids)
    assert difference(logits(load(out, case.model), case.ids), want) < LOGIT_TOLERANCE
    member = case.plan.member(0.4)
    assert report.routed_parameters == member.routed_parameters
    assert report.pruned == pytest.approx(member.achieved)
    assert report.checked == sum(record.experts for record in case.plan.layers.values())
    assert report.max_difference < 1e-5
    assert report.bytes == (member.bytes if layout == "ragged" else case.plan.bytes_full)
    assert set(seen) == {"write", "compare", "checksum"}
    assert not (out / "flexmoe.json").exists()
    about = json.loads((out / "flexmoe_export.json").read_text())
    assert about["layout"] == layout and about["recipe"]["method"] == "random"


def test_masked_keeps_best_channels_bitwise(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["gpt_oss"]
    export(case.family, tmp_path / "out", pruned=0.6, layout="masked")
    ranked, masked = tensors(case.family), tensors(tmp_path / "out")
    widths = case.plan.widths(0.6)[0].tolist()
    assert 0 in widths and max(widths) == 16
    up = "model.layers.0.mlp.experts.gate_up_proj"
    bias = f"{up}_bias"
    for e, w in enumerate(widths):  # interleaved columns of gate and up
        assert torch.equal(masked[up][e][:, : 2 * w], ranked[up][e][:, : 2 * w])
        assert torch.equal(masked[bias][e][: 2 * w], ranked[bias][e][: 2 * w])
        assert not masked[up][e][:, 2 * w :].any() and not masked[bias][e][2 * w :].any()
    others = [name for name in ranked if "experts" not in name or "down_proj_bias" in name]
    assert all(torch.equal(ranked[name], masked[name]) for name in others)


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen2_moe", "gpt_oss"])
def test_uniform_is_a_stock_checkpoint(cases: dict[str, Case], name: str, tmp_path: Path) -> None:
    case, out = cases[name], tmp_path / "out"
    report = export(case.plan_folder, out, pruned=0.45, layout="uniform", base=case.source)
    small = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    assert {layer.I for layer in expert_layers(small)} == {8}
    # half of the channels; biases of whole experts stay
    assert report.pruned == pytest.approx(0.49 if name == "gpt_oss" else 0.5)
    full = {i: torch.full((r.experts,), 8) for i, r in case.plan.layers.items()}
    want = masked_logits(case.model, full, 0.5, case.ids, case.plan.order)
    assert difference(logits(small, case.ids), want) < LOGIT_TOLERANCE
    before, after = (json.loads((p / "config.json").read_text()) for p in (case.source, out))
    assert list(before) == list(after)
    changed = {key: after[key] for key in before if before[key] != after[key]}
    assert list(changed.values()) == [8]
    assert (out / "tokenizer.json").read_bytes() == (case.source / "tokenizer.json").read_bytes()


def test_uniform_refuses_where_the_width_is_shared(cases: dict[str, Case], tmp_path: Path) -> None:
    with pytest.raises(FlexmoeError, match=r"shared_experts.*ragged or masked"):
        export(cases["deepseek_v2"].family, tmp_path / "out", pruned=0.5, layout="uniform")
    assert not any(tmp_path.iterdir())


def test_ragged_tensors_are_as_long_as_experts_are_wide(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    for name, module, gate in (
        ("mixtral", "model.layers.0.block_sparse_moe.experts", "w1.weight"),
        ("gpt_oss", "model.layers.0.mlp.experts", "gate_proj.weight"),
    ):
        case, out = cases[name], tmp_path / name
        export(case.family, out, pruned=0.6, layout="ragged")
        found, down = tensors(out), "w2.weight" if name == "mixtral" else "down_proj.weight"
        for e, w in enumerate(case.plan.widths(0.6)[0].tolist()):
            assert found[f"{module}.{e}.{gate}"].shape == (w, 32)
            assert found[f"{module}.{e}.{down}"].shape == (32, w)
        config = json.loads((out / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "flexmoe" and config["format"] == 1
        assert config["widths"] == {
            str(i): width.tolist() for i, width in case.plan.widths(0.6).items()
        }


# --- Refusals, and nothing left behind -------------------------------------------------------


def test_existing_folder_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FlexmoeError, match="exists already"):
        export(cases["olmoe"].family, tmp_path, pruned=0.4, layout="masked")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_empty_folder_is_filled(cases: dict[str, Case], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    export(cases["olmoe"].family, tmp_path / "out", pruned=0.4, layout="masked")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("layout", "name", "message"),
    [
        *(
            (layout, f"layers.1.mlp.experts.{e}.down_proj", f"layer 1 expert {e} .* differs from")
            for layout in ("uniform", "ragged", "masked")
            for e in (0, 5)
        ),
        ("masked", "lm_head", r"lm_head\.weight read back"),
        # of a channel that is gone: what the expert gives is the same
        ("masked", "layers.0.mlp.experts.0.gate_proj", "layer 0 expert 0 .* differs from"),
    ],
)
def test_damage_is_found_before_the_name_is_given(
    cases: dict[str, Case],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    layout: str,
    name: str,
    message: str,
) -> None:
    real, damaged = EXPORT.write, []

    def damage(out, shards, track):  # type: ignore[no-untyped-def]
        real(out, shards, track)
        for file in sorted(out.glob("*.safetensors")):
            raw = bytearray(file.read_bytes())
            start = 8 + int.from_bytes(raw[:8], "little")
            for key, info in json.loads(raw[8:start]).items():
                if name in key:
                    raw[start + info["data_offsets"][0] + 3] ^= 1  # its first float's exponent
                    damaged.append(key)
            file.write_bytes(raw)

    monkeypatch.setattr(EXPORT, "write", damage)
    with pytest.raises(FlexmoeError, match=message):
        export(cases["olmoe"].family, tmp_path / "out", pruned=0.2, layout=layout)
    assert len(damaged) == 1 and not any(tmp_path.iterdir())


def test_failing_write_leaves_nothing(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(EXPORT, "write", full)
    with pytest.raises(OSError, match="No space"):
        export(cases["olmoe"].family, tmp_path / "out", pruned=0.4, layout="ragged")
    assert not any(tmp_path.iterdir())


def test_wrong_arguments(cases: dict[str, Case], tmp_path: Path) -> None:
    family, out = cases["olmoe"].family, tmp_path / "out"
    with pytest.raises(FlexmoeError, match="Did you mean 'ragged'"):
        export(family, out, pruned=0.4, layout="raged")
    with pytest.raises(FlexmoeError, match="outside this plan"):
        export(family, out, pruned=0.9, layout="ragged")
    with pytest.raises(FlexmoeError, match="at least 0"):
        export(family, out, pruned=1.0, layout="uniform")
    with pytest.raises(FlexmoeError, match="weights of its own"):
        export(family, out, pruned=0.4, layout="ragged", base=family)
    assert not any(tmp_path.iterdir())


def test_plan_of_another_model_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    tiny_model("nemotron_h").save_pretrained(tmp_path / "other")
    plan = cases["mixtral"].plan_folder
    with pytest.raises(FlexmoeError, match="of another model"):
        export(plan, tmp_path / "out", pruned=0.4, layout="ragged", base=tmp_path / "other")


def test_ragged_export_is_no_base(cases: dict[str, Case], tmp_path: Path) -> None:
    case, ragged = cases["olmoe"], tmp_path / "ragged"
    export(case.family, ragged, pruned=0.4, layout="ragged")
    with pytest.raises(FlexmoeError, match="is a ragged export"):
        export(case.plan_folder, tmp_path / "out", pruned=0.4, layout="masked", base=ragged)


@pytest.mark.parametrize("name", FAMILIES)
def test_plan_alone_wants_the_very_weights(
    cases: dict[str, Case], name: str, tmp_path: Path
) -> None:
    case = cases[name]

    def traced(path: Path):  # type: ignore[no-untyped-def]
        return Checkpoint(path), trace(Checkpoint(path), meta_model(path))

    sha256 = fingerprint(*traced(case.source))
    recipe = case.plan.recipe.model_copy(update={"weights_sha256": sha256})
    plan = replace(case.plan, recipe=recipe)
    plan.save(tmp_path / "plan")
    export(tmp_path / "plan", tmp_path / "out", pruned=0.4, layout="ragged")
    # the same model and shapes, but the channels are in order already
    with pytest.raises(FlexmoeError, match="not those that the plan was made for"):
        check_weights(plan, *traced(case.family))
    with pytest.raises(FlexmoeError, match="in order already"):
        export(tmp_path / "plan", tmp_path / "no", pruned=0.4, layout="ragged", base=case.family)
    assert not (tmp_path / "no").exists()


def test_home_folder_is_meant_by_a_tilde(
    cases: dict[str, Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "family").symlink_to(cases["olmoe"].family)
    report = export("~/family", "~/out", pruned=0.4, layout="ragged")
    assert report.path == tmp_path / "out" and (tmp_path / "out" / "config.json").is_file()


def test_what_an_export_says_of_itself_is_not_passed_on(
    cases: dict[str, Case], tmp_path: Path
) -> None:
    case, masked = cases["olmoe"], tmp_path / "masked"
    export(case.family, masked, pruned=0.4, layout="masked")
    (tmp_path / "family").mkdir()
    rank_checkpoint(masked, case.plan, tmp_path / "family")
    assert (masked / "flexmoe_export.json").is_file()
    assert not (tmp_path / "family" / "flexmoe_export.json").exists()


# --- Every architecture ----------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in DECODERS if n not in TWO_IN_A_LAYER])
def test_every_decoder(name: str, tmp_path: Path) -> None:
    """Ranked, ragged and masked files of every architecture on the interface, reloaded."""
    case = make(name, tmp_path)
    assert isinstance(case.model, model_class(name))
    ranked = logits(load(case.family, case.model), case.ids)
    assert difference(ranked, logits(case.model, case.ids)) < LOGIT_TOLERANCE
    want = masked_logits(case.model, case.plan, 0.4, case.ids)
    for layout in ("ragged", "masked"):
        export(case.family, tmp_path / layout, pruned=0.4, layout=layout)
        got = logits(load(tmp_path / layout, case.model), case.ids)
        assert difference(got, want) < LOGIT_TOLERANCE
