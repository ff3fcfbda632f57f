"""Checkpoints on disk: what is read, what is refused, and names other than the usual ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import save_file
from transformers import Qwen3_5MoeForConditionalGeneration, Qwen3MoeForCausalLM

from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.errors import FlexmoeError
from flexmoe.exporter import export
from flexmoe.family import find_folder
from flexmoe.family import load as open_member
from flexmoe.files import check_file, refuse_existing, written_beside
from flexmoe.headers import resolve
from flexmoe.names import missing_parameters
from flexmoe.premoe.store import fingerprint_of
from flexmoe.trace import same_weights, trace
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
from zoo import filled, tiny_config, tiny_model


@pytest.mark.parametrize("prefix", ["fused", "no prefix"])
def test_other_names_for_the_same_weights(prefix: str, tmp_path: Path) -> None:
    """The layout of the model in memory, and a base model's names without their prefix."""
    model, source = tiny_model("mixtral"), tmp_path / "source"
    model.save_pretrained(source, save_original_format=prefix != "fused")
    if prefix == "no prefix":
        found = tensors(source)
        save_file(
            {k.removeprefix("model."): v for k, v in found.items()}, source / "model.safetensors"
        )
    plan, ids = random_plan(model, source), ids_of(model)
    plan.save(tmp_path / "plan")
    want = masked_logits(model, plan, 0.4, ids)
    for layout in ("ragged", "masked"):
        export(tmp_path / "plan", tmp_path / layout, pruned=0.4, layout=layout)
        got = logits(load(tmp_path / layout, model), ids)
        assert difference(got, want) < LOGIT_TOLERANCE


def test_either_of_two_tied_tensors_is_enough(tmp_path: Path) -> None:
    """transformers stores the embeddings, others the head; it reads both."""
    config = tiny_config("qwen3_moe")
    config.tie_word_embeddings = True
    model = filled(Qwen3MoeForCausalLM(config))
    model.save_pretrained(tmp_path)
    found = tensors(tmp_path)
    found["lm_head.weight"] = found.pop("model.embed_tokens.weight")
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    missing_parameters(Checkpoint(tmp_path), meta_model(tmp_path))
    del found["lm_head.weight"]
    save_file(found, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FlexmoeError, match="1 parameters are in no file"):
        missing_parameters(Checkpoint(tmp_path), meta_model(tmp_path))


def test_an_index_left_from_shards_that_are_gone_is_not_read(tmp_path: Path) -> None:
    """transformers leaves it where a model is saved again in one file, and reads that file."""
    for size in ("50KB", "1GB"):
        tiny_model("mixtral").save_pretrained(tmp_path, max_shard_size=size)
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert Checkpoint(tmp_path).files == ["model.safetensors"]
    trace(Checkpoint(tmp_path), meta_model(tmp_path))


@pytest.mark.parametrize("part", ["w1", "w3", "w2", "gate", "q_proj", "embed_tokens"])
def test_a_fingerprint_knows_tuned_weights(part: str, tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    before, found = fingerprint_of(tmp_path), tensors(tmp_path)
    for name in (name for name in found if f".{part}." in name):
        found[name] = found[name] * 1.01
    save_file(found, tmp_path / "model.safetensors")
    after = fingerprint_of(tmp_path)
    assert same_weights(before, before) and not same_weights(before, after)
    of_older_versions = before.partition(":")[2]  # down channels alone
    assert same_weights(before, of_older_versions)
    assert same_weights(of_older_versions, after) == (part != "w2")


def test_transposed_hub_layout(tmp_path: Path) -> None:
    """The hub has this family's experts transposed; saved again they are not. Both load."""
    model, source = tiny_model("qwen3_vl_moe"), tmp_path / "source"
    # I != H / 2, or the shapes would not tell (nor would they tell transformers)
    config = json.loads(model.config.to_json_string())
    config["text_config"]["moe_intermediate_size"] = 24
    model = type(model)(type(model.config).from_dict(config)).eval()
    model.save_pretrained(source)
    found = {k: v.mT.contiguous() if "experts" in k else v for k, v in tensors(source).items()}
    save_file(found, source / "model.safetensors", metadata={"format": "pt"})
    pieces = trace(Checkpoint(source), meta_model(source))[0].stored
    assert {(piece.sides, piece.axis) for piece in pieces} == {
        (("gate", "up"), -1),
        (("down",), -2),
    }
    plan, ids = random_plan(model, source), ids_of(model)
    plan.save(tmp_path / "plan")
    for layout in ("ragged", "masked"):
        export(tmp_path / "plan", tmp_path / layout, pruned=0.4, layout=layout)
        got = logits(load(tmp_path / layout, model), ids)
        assert difference(got, masked_logits(model, plan, 0.4, ids)) < LOGIT_TOLERANCE


@pytest.mark.parametrize("fused", [False, True])
def test_text_part_of_a_multimodal_checkpoint(fused: bool, tmp_path: Path) -> None:
    """transformers gives the text model alone, whose names lack a prefix of the files. A ragged
    export is one of the whole checkpoint, too."""
    config = tiny_config("qwen3_5_moe")
    config.text_config.layer_types = ["linear_attention", "full_attention"]
    whole = filled(Qwen3_5MoeForConditionalGeneration(config))
    whole.save_pretrained(tmp_path / "source", save_original_format=not fused)
    model, ids = meta_model(tmp_path / "source"), ids_of(whole)
    assert model.config.model_type == "qwen3_5_moe_text"
    plan = random_plan(model, tmp_path / "source")
    plan.save(tmp_path / "plan")
    export(tmp_path / "plan", tmp_path / "ragged", pruned=0.4, layout="ragged")
    want = masked_logits(whole, plan, 0.4, ids)
    for opened in (load(tmp_path / "ragged", whole), open_member(tmp_path / "ragged")):
        assert difference(logits(opened, ids), want) < LOGIT_TOLERANCE


def test_a_local_folder_is_meant_before_the_packaged_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("mixtral").save_pretrained("tiny")
    assert resolve("tiny") == find_folder("tiny") == Path("tiny")


def test_only_what_belongs_to_a_checkpoint_is_copied(tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_model("mixtral").save_pretrained(model)
    belongs = ["config.json", "generation_config.json", "code/own.py", "1_Pooling/config.json"]
    other = ["a.work/settings.json", ".cache/x.json", "plan/flexmoe.json", "plan/README.md"]
    for name in (*belongs[2:], *other):
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text("{}")
    tiny_model("mixtral").save_pretrained(model / "another")
    assert sorted(map(str, Checkpoint(model).other_files())) == sorted(belongs)


def test_resolve_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FlexmoeError, match="no folder"):
        resolve(tmp_path / "nowhere")
    with pytest.raises(FlexmoeError, match="could not be downloaded"):
        resolve("nobody/no-such-model")  # the suite runs offline
    with pytest.raises(FlexmoeError, match=r"no config\.json"):
        resolve(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FlexmoeError, match="weights are missing"):
        resolve(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FlexmoeError, match="pickles"):
        resolve(tmp_path)


def test_tiny_is_in_the_package() -> None:
    checkpoint = Checkpoint(resolve("tiny"))
    assert trace(checkpoint, meta_model(checkpoint.path))


def test_cut_short_and_missing_shards(tmp_path: Path) -> None:
    model, source = tiny_model("olmoe"), tmp_path / "source"
    model.save_pretrained(source, max_shard_size="50KB")
    shard = sorted(source.glob("*.safetensors"))[0]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-4])
    with pytest.raises(FlexmoeError, match="cut short"):
        Checkpoint(source)
    shard.unlink()
    with pytest.raises(FlexmoeError, match="is missing"):
        Checkpoint(source)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", b"{", r"config\.json is not valid JSON"),
        ("config.json", b"\xff\xfe\x00", r"config\.json is not valid JSON"),
        ("config.json", b"[]", "holds a list"),
        ("model.safetensors.index.json", b"oops", r"index\.json is not valid JSON"),
        ("model.safetensors.index.json", b"{}", "has no 'weight_map'"),
        ("model.safetensors", b"", "damaged safetensors header"),
        ("model.safetensors", b"\x02" + bytes(7) + b"{x", "damaged safetensors header"),
        ("model.safetensors", b"\x02" + bytes(7) + b"[]", "damaged safetensors header"),
        ("model.safetensors", b"\x08" + bytes(7) + b'{"a":{}}', "damaged safetensors header"),
        ("model.safetensors", b"\x09" + bytes(7) + b"{}", "cut short"),
    ],
)
def test_damaged_files(file: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / file).write_bytes(content)
    with pytest.raises(FlexmoeError, match=message):
        Checkpoint(tmp_path)
    if file == "config.json":
        with pytest.raises(FlexmoeError, match=message):
            meta_model(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        dict(hidden_size="wide"),
        dict(hidden_act="nope"),
        dict(num_local_experts=-1),
        dict(attn_implementation="flash_attention_2"),  # a package that is not there
    ],
)
def test_config_that_cannot_be_built(change: dict[str, object], tmp_path: Path) -> None:
    config = tiny_model("mixtral").config.to_dict() | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlexmoeError, match=r"cannot build the 'mixtral' model of .*config\.json"):
        meta_model(tmp_path)


class Hub:
    """A hub that has one model, and what was asked of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.folder, self.asked = folder, []  # type: ignore[var-annotated]
        monkeypatch.setattr(huggingface_hub, "hf_hub_download", self.file)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.snapshot)

    def file(self, model: str, name: str) -> str:
        self.asked.append(name)
        return str(self.folder / name)

    def snapshot(self, model: str, **patterns: list[str]) -> str:
        self.asked.append(patterns)
        return str(self.folder)


def test_download_leaves_out_second_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("olmoe").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}  # which `dequantize` asks for
    (tmp_path / "config.json").write_text(json.dumps(config))
    hub = Hub(tmp_path, monkeypatch)
    assert resolve("owner/model", quantized=True) == tmp_path
    config, patterns = hub.asked
    assert config == "config.json"
    files = [
        "config.json", "tokenizer.model", "chat_template.jinja", "model-00001-of-00002.safetensors",
        "consolidated.safetensors", "original/model.safetensors", "original/params.json",
        "pytorch_model.bin", "metal/model.safetensors",
    ]  # fmt: skip
    assert list(filter_repo_objects(files, **patterns)) == files[:4]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": "mxfp4"}}, r"is quantized \(mxfp4\)"),
        ({"text_config": {"quantization_config": {"quant_method": "int4"}}}, r"quantized \(int4\)"),
        ({"model_type": "kimi_k2", "auto_map": {"AutoModel": "own.py"}}, r"kimi_k2.*is never run"),
    ],
)
def test_what_cannot_be_used_is_refused_before_its_weights_come(
    config: dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    hub = Hub(tmp_path, monkeypatch)
    with pytest.raises(FlexmoeError, match=message):
        resolve("owner/model")
    assert hub.asked == ["config.json"]


def test_config_of_another_size_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "source"
    tiny_model("mixtral").save_pretrained(source)
    config = json.loads((source / "config.json").read_text())
    config["num_local_experts"] = 6
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlexmoeError, match="do not belong together"):
        trace(Checkpoint(source), meta_model(source))


def test_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    config = tiny_model("mixtral").config.to_dict()
    config["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FlexmoeError, match=r"quantized \(fp8\)"):
        meta_model(tmp_path)


# --- Folders that appear complete or not at all ----------------------------------------------


def test_folders_of_killed_processes_go(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine, init = os.getpid(), 1
    for name in (f".out.partial-{dead.pid}", f".out.partial-{mine}"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shard").write_text("half")
    kept = {f".out.partial-{init}", f".other.partial-{dead.pid}", ".out.partial-", ".out.x"}
    for name in kept:
        (tmp_path / name).mkdir()
    with written_beside(tmp_path / "out") as partial:
        assert {p.name for p in tmp_path.iterdir()} == kept | {partial.name}
        assert not any(partial.iterdir())
    assert {p.name for p in tmp_path.iterdir()} == kept | {"out"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_folder_has_the_usual_permissions(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        with written_beside(tmp_path / "out"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_file_for_results_has_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "folder" / "results.json"
    check_file(path).touch()
    monkeypatch.setattr("os.access", lambda place, mode: place != path)
    with pytest.raises(FlexmoeError, match="it is read-only, give another file"):
        check_file(path)
    with pytest.raises(FlexmoeError, match="cannot write '/proc/results"):
        check_file(Path("/proc/results.json"))  # which says that root may write


def test_folders_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for out in (Path("/proc/nope/out"), tmp_path / "file" / "out"):
        with pytest.raises(FlexmoeError, match="cannot write"), written_beside(out):
            pytest.fail("the block ran")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    with pytest.raises(FlexmoeError, match="no permission"):
        refuse_existing(tmp_path / "out")
