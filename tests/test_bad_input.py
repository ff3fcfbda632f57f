"""Whatever is wrong: one message on one screen, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flexmoe.cli import main
from flexmoe.exporter import export
from flexmoe.headers import resolve
from flexmoe.methods import all_methods
from flexmoe.pipeline import CompressConfig, compress
from zoo import tiny_model, tiny_off_interface

TEXT = "The quick brown fox jumps over the lazy dog. " * 400
METHODS = {
    "parse": "def score(:\n",
    "import": "import no_such_module\n",
    "undecorated": "def score(layer, stats):\n    return stats\n",
    "raises": '@flexmoe.method("mine", paper="", needs=("fisher_EI",))\n'
    "def score(layer, stats):\n    return stats['nothing_EI']\n",
    "shape": '@flexmoe.method("mine", paper="", needs=("fisher_EI",))\n'
    "def score(layer, stats):\n    return stats['fisher_EI'].sum(1)\n",
    "none": '@flexmoe.method("mine", paper="", needs=("fisher_EI",))\n'
    "def score(layer, stats):\n    print('no score')\n",
    "nan": '@flexmoe.method("mine", paper="")\n'
    "def score(layer, stats):\n    return torch.full((layer.E, layer.I), float('nan'))\n",
    "needs": '@flexmoe.method("mine", paper="", needs=("fisher",))\n'
    "def score(layer, stats):\n    return stats['fisher']\n",
}


def with_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resolve("tiny") / name, folder / name)


def copied(source: Path, name: str) -> Path:
    return Path(shutil.copytree(source, source.with_name(name)))


def configured(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the commands below are given."""
    root = tmp_path_factory.mktemp("places")
    model = tiny_model("qwen3_moe", vocab_size=4096)
    good = root / "good"
    model.save_pretrained(good, max_shard_size="300KB")
    with_tokenizer(good)
    shards = sorted(path.name for path in good.glob("*.safetensors"))
    with_channels = next(
        s for s in shards if any(".experts." in name for name in load_file(good / s))
    )
    others = next(s for s in shards if any("norm" in name for name in load_file(good / s)))

    LlamaForCausalLM(
        LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, vocab_size=4096)
    ).save_pretrained(root / "dense")
    tiny_off_interface("jetmoe").save_pretrained(root / "off")
    (root / "empty").mkdir()
    pickled = root / "pickled"
    pickled.mkdir()
    shutil.copy(good / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    (copied(good, "missing") / with_channels).unlink()
    cut = copied(good, "cut") / with_channels
    cut.write_bytes(cut.read_bytes()[:-5])
    renamed = copied(good, "foreign") / others
    save_file(
        {k if ".experts." in k else f"other.{k}": v for k, v in load_file(renamed).items()}, renamed
    )
    reshaped = copied(good, "reshaped") / others
    save_file(
        {k: v[:-1].clone() if "norm" in k else v for k, v in load_file(reshaped).items()}, reshaped
    )
    for name, value in (("nan", float("nan")), ("inf", float("inf"))):
        damaged = copied(good, name) / others
        tensors = load_file(damaged)
        tensors[next(k for k in tensors if "norm" in k)][0] = value
        save_file(tensors, damaged, metadata={"format": "pt"})
    (copied(good, "index") / "model.safetensors.index.json").write_text("{")
    (copied(good, "config") / "config.json").write_text("[1]")
    configured(copied(good, "custom"), model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    configured(copied(good, "quantized"), quantization_config={"quant_method": "fp8"})
    configured(copied(good, "greedy"), num_experts_per_tok=20)
    configured(copied(good, "unbuildable"), hidden_act="nope")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (copied_to := root / "untokenized").exists() or copied(good, "untokenized"):
            (copied_to / name).unlink()
    (copied(good, "garbled") / "tokenizer.json").write_text("{")
    small = tiny_model("qwen3_moe")
    small.save_pretrained(root / "small")
    with_tokenizer(root / "small")

    for name, content in {
        "empty.txt": b"", "short.txt": b"two words", "binary.txt": bytes(range(256)),
        "plain.txt.gz": b"no gzip", "cut.jsonl.gz": b"\x1f\x8b\x08\x00", "bad.jsonl": b"{\n",
        "field.jsonl": b'{"body": "text"}\n', "list.jsonl": b"[1]\n", "text.pdf": b"%PDF",
        "text.txt": TEXT.encode(),
    }.items():  # fmt: skip
        (root / name).write_bytes(content)
    for name, code in METHODS.items():
        (root / f"{name}.py").write_text(f"import torch\nimport flexmoe\n\n\n{code}")

    settings_ = CompressConfig(method="magnitude", allocate="global", pruned=(0.2, 0.4))
    plan = compress(good, root / "family", settings_)
    plan.save(root / "plan")
    path = copied(root / "family", "family-cut") / "flexmoe.json"
    path.write_bytes(path.read_bytes()[:-100])
    path = copied(root / "family", "family-edited") / "flexmoe.json"
    path.write_text(path.read_text().replace('"quantum": 1', '"quantum": 2'))
    path = copied(root / "family", "family-newer") / "flexmoe.json"
    path.write_text(path.read_text().replace('"format": 1', '"format": 7'))
    path = copied(root / "family", "family-order") / "flexmoe.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x09")
    (copied(root / "family", "family-half") / "flexmoe.safetensors").unlink()
    other = tiny_model("qwen3_moe", seed=1, vocab_size=4096)
    other.save_pretrained(root / "other")
    with_tokenizer(root / "other")
    mixtral = tiny_model("mixtral", vocab_size=4096)
    mixtral.save_pretrained(root / "mixtral")
    with_tokenizer(root / "mixtral")
    export(root / "family", root / "export", pruned=0.4, layout="ragged")
    (copied(root / "export", "export-edited") / "flexmoe_export.json").write_text("{}")
    (copied(root / "export", "export-cut") / "flexmoe_export.json").write_text("{")
    (root / "file").write_text("in the way")
    (root / "full").mkdir()
    (root / "full" / "kept").write_text("mine")
    (root / "killed.work").mkdir()
    (root / "killed.work" / "settings.json").write_text("{")
    (root / "killed.work" / "done.json").write_text("{}")  # something would be lost
    return root


COMPRESS = "compress {} -o out --data text.txt --samples 2 --seq-len 16 --allocate global"
GOOD = COMPRESS.format("good")
RECOVER = "recover {} -o out --data text.txt --tokens 64 --seq-len 16 --batch-size 2"
EVAL = "eval {} --data text.txt --samples 1 --seq-len 16"

ROWS = [
    # the model
    (COMPRESS.format("./nowhere"), "there is no folder './nowhere'"),
    (COMPRESS.format("nobody/no-such-model"), "could not be downloaded"),
    (COMPRESS.format("file"), "there is no folder 'file'"),
    (COMPRESS.format("empty"), "no config.json"),
    (COMPRESS.format("dense"), "no routed experts found in LlamaForCausalLM"),
    (COMPRESS.format("off"), "not on the transformers experts interface"),
    (COMPRESS.format("pickled"), "its weights are pickles"),
    (COMPRESS.format("missing"), "is missing: the checkpoint is incomplete"),
    (COMPRESS.format("cut"), "cut short or damaged"),
    (COMPRESS.format("foreign"), "parameters are in no file"),
    (COMPRESS.format("reshaped"), "is [31], expected [32]"),
    (COMPRESS.format("nan"), "1 values that are NaN or infinite"),
    (COMPRESS.format("inf"), "1 values that are NaN or infinite"),
    (COMPRESS.format("index"), "index.json is not valid JSON"),
    (COMPRESS.format("config"), "holds a list"),
    (COMPRESS.format("custom"), "such code is never run"),
    (COMPRESS.format("quantized"), "is quantized (fp8)"),
    (COMPRESS.format("greedy"), "as many experts a token as there are experts"),
    (COMPRESS.format("unbuildable"), "cannot build the 'qwen3_moe' model"),
    (COMPRESS.format("untokenized"), "tokenizer"),
    (COMPRESS.format("garbled"), "the tokenizer in"),
    (COMPRESS.format("small"), "knows 4096 tokens, the model 64"),
    (COMPRESS.format("export"), "is a ragged export: start from its family"),
    # the text
    (GOOD.replace("text.txt", "nothing.txt"), "data file 'nothing.txt' does not exist"),
    (GOOD.replace("text.txt", "full"), "'full'"),
    (GOOD.replace("text.txt", "empty.txt"), "empty.txt"),
    (GOOD.replace("text.txt", "short.txt"), "short.txt"),
    (GOOD.replace("text.txt", "binary.txt"), "binary.txt"),
    (GOOD.replace("text.txt", "plain.txt.gz"), "plain.txt.gz"),
    (GOOD.replace("text.txt", "cut.jsonl.gz"), "cut.jsonl.gz"),
    (GOOD.replace("text.txt", "bad.jsonl"), "bad.jsonl, line 1"),
    (GOOD.replace("text.txt", "field.jsonl"), "'text'"),
    (GOOD.replace("text.txt", "list.jsonl"), "list.jsonl, line 1"),
    (GOOD.replace("text.txt", "text.pdf"), "text.pdf"),
    # budgets
    (f"{GOOD} --pruned 40%", "is no list of pruned shares"),
    (f"{GOOD} --pruned ,", "is no list of pruned shares"),
    (f"{GOOD} --pruned 0.4,0.4", "a pruned share twice"),
    (f"{GOOD} --pruned nan", "must lie between 0 and 1"),
    (f"{GOOD} --pruned 1", "must lie between 0 and 1"),
    (f"{GOOD} --pruned 40", "0.4 means 40 %"),
    ("export family --pruned 0.9 --layout ragged -o out", "reaches from 0 to 0.4"),
    ("export family --pruned nan --layout ragged -o out", "outside this plan"),
    ("export family --pruned 1 --layout uniform -o out", "less than 1"),
    ("export family --pruned much --layout ragged -o out", "Invalid value for '--pruned'"),
    (f"{EVAL.format('family')} --pruned 0,0.9", "reaches from 0 to 0.4"),
    (f"{EVAL.format('export')} --pruned 0.2", "cannot be opened at 0.2"),
    # places
    (GOOD.replace("-o out", "-o full"), "exists already"),
    (GOOD.replace("-o out", "-o file"), "exists already"),
    (GOOD.replace("-o out", "-o file/out"), "is a file"),
    ("export family --pruned 0.4 --layout masked -o full", "exists already"),
    (f"{EVAL.format('family')} --json full", "it is a folder"),
    (f"{EVAL.format('family')} --json file/rows.json", "no folder to write in"),
    (GOOD.replace("-o out", "-o killed"), "remove"),
    # plans and families
    ("export nowhere --pruned 0.4 --layout ragged -o out", "nowhere"),
    ("export good --pruned 0.4 --layout ragged -o out", "not a flexmoe family"),
    ("export family-cut --pruned 0.4 --layout ragged -o out", "is not valid JSON"),
    ("export family-edited --pruned 0.4 --layout ragged -o out", "is damaged or was edited"),
    ("export family-newer --pruned 0.4 --layout ragged -o out", "has format 7"),
    ("export family-order --pruned 0.4 --layout ragged -o out", "its sha256 does not fit"),
    ("export family-half --pruned 0.4 --layout ragged -o out", "flexmoe.safetensors is missing"),
    ("export plan --pruned 0.4 --layout ragged -o out --base other", "are not those that the plan"),
    ("export plan --pruned 0.4 --layout ragged -o out --base mixtral", "is of another model"),
    ("export family --pruned 0.4 --layout ragged -o out --base good", "weights of its own"),
    (EVAL.format("family-order"), "its sha256 does not fit"),
    (EVAL.format("export-edited"), "does not say what was pruned"),
    (EVAL.format("export-cut"), "is not valid JSON"),
    (RECOVER.format("family-edited"), "is damaged or was edited"),
    (RECOVER.format("good"), "not a flexmoe family"),
    # methods and options
    (f"{GOOD} --method fischer", "Did you mean 'fisher'"),
    (f"{GOOD} --method nothing.py:score", "'nothing.py' does not exist"),
    (f"{GOOD} --method parse.py", "names a file but no function"),
    (f"{GOOD} --method parse.py:score", "'parse.py', line 5"),
    (f"{GOOD} --method import.py:score", "ModuleNotFoundError: No module named 'no_such_module'"),
    (f"{GOOD} --method undecorated.py:score", "decorate it"),
    (f"{GOOD} --method raises.py:score", "KeyError: 'nothing_EI', line 7"),
    (f"{GOOD} --method shape.py:score", "gave shape [8] for layer 0, expected [8, 16]"),
    (f"{GOOD} --method none.py:score", "gave a NoneType"),
    (f"{GOOD} --method needs.py:score", "unknown statistic 'fisher'"),
    ("compress good -o out --allocate global --method nan.py:score", "that are not finite"),
    (GOOD.replace("--allocate global", "--allocate globl"), "Did you mean 'global'"),
    (f"{GOOD} --sample 3", "Possible options: --samples"),
    ("export family --pruned 0.4 --layout raged -o out", "Did you mean 'ragged'"),
    (f"{RECOVER.format('family')} --mode ful", "Did you mean 'full'"),
    (f"{RECOVER.format('family')} --scheme famly", "Did you mean 'family'"),
    (f"{RECOVER.format('family')} --at 4", "0.4 means 40 %"),
    (f"{GOOD} --device gpu", "no device 'gpu'"),
    (f"{GOOD} --quantum 64", "wider than an expert of 16 channels"),
    ("doctor ./nowhere", "there is no folder './nowhere'"),
    ("pick family --memory 24XB", "24XB"),
]


def run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that must fail. Methods of a file are forgotten afterwards."""
    monkeypatch.setattr("flexmoe.methods.METHODS", dict(all_methods()))
    monkeypatch.setattr(sys, "argv", ["flexmoe", *command.split()])
    monkeypatch.setenv("COLUMNS", "300")
    with pytest.raises(SystemExit) as stop:
        main()
    said = capsys.readouterr()
    assert stop.value.code == 2, said.out + said.err
    return said.out + said.err


@pytest.mark.parametrize(("command", "words"), ROWS, ids=[command for command, _ in ROWS])
def test_a_mistake_is_one_message_and_leaves_nothing(
    command: str,
    words: str,
    places: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(places)
    before = sorted(str(path) for path in places.rglob("*"))
    said = run(command, monkeypatch, capsys)
    assert words in said and "Traceback" not in said
    message = said[said.rfind("flexmoe: ") :]  # progress bars may stand before it
    assert len(message.splitlines()) < 12 and len(message) < 1500
    cache = ("__pycache__", ".pyc")
    left = [p for p in sorted(str(path) for path in places.rglob("*")) if not p.endswith(cache)]
    assert [p for p in left if p not in before] == []
    assert (places / "full" / "kept").read_text() == "mine"


def test_a_full_disk_is_noticed_before_anything_is_written(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(places)
    usage = shutil.disk_usage(places)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for command in (
        GOOD,
        "export family --pruned 0.4 --layout ragged -o out",
        RECOVER.format("family"),
    ):
        assert "free" in run(command, monkeypatch, capsys)
        assert not list(places.glob("*out*"))


def test_all_problems_are_said_at_once(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(places)
    both = copied(places / "cut", "both")
    configured(both, quantization_config={"quant_method": "fp8"})
    (both / "tokenizer.json").unlink()
    (both / "tokenizer_config.json").unlink()
    said = run(COMPRESS.format("both"), monkeypatch, capsys)
    shutil.rmtree(both)
    for words in ("is quantized (fp8)", "cut short", "tokenizer"):
        assert words in said
    assert "ragged" not in said


def test_what_a_file_cannot_say_is_said_with_the_file(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Root may read everything, so the refusal is made up."""
    monkeypatch.chdir(places)

    def denied(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    said = run("export family --pruned 0.4 --layout ragged -o out", monkeypatch, capsys)
    assert "Permission denied: 'family/flexmoe.json'" in said
