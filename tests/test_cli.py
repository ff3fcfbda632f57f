"""The command line: what it prints, what it writes, how it refuses."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from flexmoe.cli import app, main
from flexmoe.evaluation.evaluate import EvaluateConfig, measure
from flexmoe.resume import Work
from zoo import tiny_model

MATH = EvaluateConfig(data="math.valid", samples=2, seq_len=64)


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    out = tmp_path_factory.mktemp("cli") / "family"
    command = f"compress tiny -o {out} --samples 8 --seq-len 64 --pruned 0.2,0.4 --allocate global"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert "40%" in result.output and "flexmoe eval" in result.output
    return out


@pytest.mark.parametrize(
    ("model_type", "layout"), [("mixtral", "uniform"), ("deepseek_v3", "ragged")]
)
def test_the_export_that_compress_names_can_be_written(model_type, layout, tmp_path, monkeypatch):
    """Where one value sets the width of shared experts too, no uniform one can."""
    monkeypatch.chdir(tmp_path)
    tiny_model(model_type).save_pretrained("model")
    command = "compress model -o family --method magnitude --allocate layer --pruned 0.5"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    named = " ".join(result.output.split()).rpartition("or flexmoe ")[2]
    assert named == f"export family --pruned 0.5 --layout {layout} -o DIR"
    assert CliRunner().invoke(app, named.split()).exit_code == 0


def test_a_command_that_takes_over_is_looked_at_as_any_other(tmp_path, monkeypatch):
    """Nothing was saved, so what its folder of state says was looked at is another command."""
    monkeypatch.setattr("flexmoe.doctor.diagnosis.before_compress", lambda *_: ["too large"])
    with Work(tmp_path / "out", {"model": "other"}).on():
        pass
    command = f"compress tiny -o {tmp_path}/out --method magnitude --allocate layer --pruned 0.5"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0 and "warning: too large" in result.output


def test_eval_writes_rows_of_every_budget_and_file(family, tmp_path):
    out = tmp_path / "rows.json"
    command = f"eval {family} --data books.valid,math.valid --samples 2 --seq-len 64 --json {out}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["model"] == str(family)
    rows = found["rows"]
    assert [(row["pruned"], row["data"]) for row in rows] == [
        (share, name) for share in (0.0, 0.2, 0.4) for name in ("books.valid", "math.valid")
    ]
    measures = ["nll", "increase", "kept", "kl", "agreement"]
    assert set(rows[0]) == {
        "pruned", "data", "tokens", "perplexity", "routed_parameters", "bytes",
        *measures, *(f"{name}_interval" for name in measures),
    }  # fmt: skip
    assert all(row["tokens"] == 2 * 63 for row in rows)
    assert rows[0]["nll"] < rows[-2]["nll"] and rows[0]["bytes"] > rows[-1]["bytes"]


@pytest.mark.parametrize(
    "words",
    [
        ["compress", "tiny", "--data", ""],
        ["score", "tiny", "--method", "reap", "--data", ""],
        ["eval", "tiny", "--policy", "top-any:0.9", "--policy-data", ""],
    ],
)
def test_empty_data_is_not_left_out(words, tmp_path):
    """As an empty variable of a shell gives it."""
    out = [] if words[0] == "eval" else ["-o", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*words, *out])
    assert "--data is empty" in str(result.exception)
    assert list(tmp_path.iterdir()) == []


def test_brackets_in_help_are_no_markup():
    result = CliRunner().invoke(app, ["compare", "--help"], env={"COLUMNS": "160"})
    assert "METHOD[@ALLOCATE][+ROUTER],... or all" in result.output


@pytest.mark.parametrize("layout", ["uniform", "ragged", "masked"])
def test_export_then_eval_of_the_export(family, tmp_path, layout):
    out = tmp_path / "member"
    command = f"export {family} --pruned 0.4 --layout {layout} -o {out}"
    result = CliRunner().invoke(app, command.split())
    assert result.exit_code == 0, result.output
    assert "64 experts read back" in result.output
    (row,) = measure(out, MATH).rows
    (member,) = measure(family, replace(MATH, pruned=(0.4,))).rows
    assert row["pruned"] == (0.375 if layout == "uniform" else 0.4)
    full = 1_572_864
    if layout == "uniform":  # 40 of 64 channels: the multiple of 8 nearest to 38.4
        assert row["routed_parameters"] == full * 40 // 64
    else:
        assert row["nll"] == pytest.approx(member["nll"], rel=1e-6)
        stored = member["routed_parameters"] if layout == "ragged" else full
        assert row["routed_parameters"] == stored
    if layout == "ragged":
        assert row["bytes"] == member["bytes"]


def test_eval_of_a_plain_checkpoint():
    (row,) = measure("tiny", MATH).rows
    assert row["pruned"] == 0.0 and row["routed_parameters"] == 1_572_864


def test_methods_lists_all_with_paper_and_unit():
    output = CliRunner().invoke(app, ["methods"]).output
    for name in ("taylor", "fisher", "heapr", "camera", "magnitude", "random", "reap", "peu"):
        assert name in output
    for word in ("channel", "expert", "passes", "cost", "rule", "learned", "actions"):
        assert word in output


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("compress ./nowhere -o out", "there is no folder './nowhere'"),
        ("compress tiny -o out --method fischer", "Did you mean 'fisher'"),
        ("compress tiny -o out --allocate globl", "Did you mean 'global'"),
        ("compress tiny -o out --pruned 40%", "is no list of pruned shares"),
        ("compress tiny -o out --pruned 40", "40 % of the routed-expert parameters"),
        (
            "compress tiny -o out --allocate global --learn-steps 5",
            "no effect with allocate 'global'",
        ),
        ("compress tiny -o out --data missing.jsonl", "does not exist"),
        ("compress tiny -o out --learn-steps 0", "at least 1 step"),
        ("compress tiny -o out --device gpu", "no device 'gpu'"),
        ("compress tiny -o out --quantum -2", "quantum must be at least 1"),
        ("compress tiny -o out --pruned ,", "is no list of pruned shares"),
        ("compress tiny -o out --seq-len 5000", "context of 1024 tokens"),
        (
            "compress tiny -o out --allocate global --method random --samples 8",
            "samples without effect",
        ),
        ("eval tiny --samples 0", "samples must be at least 1"),
        ("eval tiny --seq-len 1", "from 2 to the model's context"),
        ("compress tiny -o out --samples 100000", "lower --samples"),
        ("export nowhere --pruned 0.4 --layout ragged -o out", "nowhere"),
        ("eval tiny --pruned 0,0.4", "--pruned has no effect"),
        ("eval tiny --pruned 0.4", "cannot be opened at 0.4"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(command, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flexmoe", *command.split()])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert len(error.splitlines()) < 10
    assert not (tmp_path / "out").exists()


def test_unknown_commands_and_layouts_get_suggestions(family, tmp_path):
    output = CliRunner().invoke(app, ["comprss", "tiny"]).output
    assert "Did you mean 'compress'" in output
    from flexmoe import FlexmoeError, export

    with pytest.raises(FlexmoeError, match="Did you mean 'ragged'"):
        export(family, tmp_path / "x", pruned=0.4, layout="raged")


def test_import_is_quick_and_loads_neither_torch_nor_transformers():
    code = (
        "import sys, time; start = time.perf_counter(); import flexmoe;"
        "print(time.perf_counter() - start);"
        "print(sorted({'torch', 'transformers', 'matplotlib', 'pydantic'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, loaded = run.stdout.splitlines()
    assert loaded == "[]"
    assert float(seconds) < 0.3


def test_public_names_stay_what_they_are():
    """Functions named like what they do must not turn into modules once those are imported."""
    import flexmoe

    for _ in range(2):
        for name in flexmoe.__all__:
            assert callable(getattr(flexmoe, name)), name
    with pytest.raises(AttributeError):
        _ = flexmoe.nothing


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(28, "No space left on device"), "flexmoe: No space left on device\n"),
        (OSError(2, "No such file", "x"), "flexmoe: No such file: 'x'\n"),
        (SafetensorError("I/O error: File too large"), "flexmoe: I/O error: File too large\n"),
        (MemoryError(), "flexmoe: out of memory\nUse a smaller --batch-size"),
        (RuntimeError("can't allocate memory: you tried"), "flexmoe: can't allocate memory"),
    ],
)
def test_a_full_machine_is_one_message(error, said, monkeypatch, capsys):
    def fail():
        raise error

    monkeypatch.setattr("flexmoe.cli.commands.app", fail)
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and capsys.readouterr().err.startswith(said)


def test_other_errors_are_not_hidden(monkeypatch):
    monkeypatch.setattr("flexmoe.cli.commands.app", lambda: {}["x"])
    with pytest.raises(KeyError):
        main()
