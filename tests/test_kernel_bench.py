"""``flexmoe bench kernels``."""

import json

from typer.testing import CliRunner

from flexmoe.cli import app
from flexmoe.errors import FlexmoeError
from flexmoe.kernels import measure


def test_bench_measures_what_it_says_and_refuses_before(tmp_path, monkeypatch):
    first = measure.limits()
    half = {name: rate / 2 for name, rate in first["flop_per_s"].items()}
    twice = 2 * first["bytes_per_s"]
    seen = iter([first, {"flop_per_s": half, "bytes_per_s": twice}])
    monkeypatch.setattr(measure, "limits", lambda: next(seen))
    out = tmp_path / "kernels.json"
    command = "bench kernels --shape 4,64,32,2 --tokens 1,9 --repeats 1 --dtype float32"
    result = CliRunner().invoke(app, [*command.split(), "--device", "cpu", "-o", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert found["machine"] == first | {"bytes_per_s": twice}  # the best of both looks
    assert [row["T"] for row in found["rows"]] == [1, 9]
    for row in found["rows"]:
        assert {"transformers eager", *measure.BUDGETS, *measure.MIXED} <= set(row["seconds"])
        assert min(row["seconds"].values()) > 0
        assert row["work"]["100 %"]["flop"] == row["T"] * 2 * 6 * 64 * 32
        half, machine = row["work"]["50 % ragged"], found["machine"]
        assert half["bytes"] < row["work"]["100 %"]["bytes"]
        least = half["flop"] / machine["flop_per_s"]["float32"]
        assert half["roof_s"] == max(least, half["bytes"] / machine["bytes_per_s"])
    for wrong in (
        "--shape 4,64,32",
        "--shape 4,64,32,5",
        "--tokens 0",
        "--dtype float16",
        "--device cuda:99",
    ):
        assert isinstance(
            CliRunner().invoke(app, f"bench kernels {wrong}".split()).exception, FlexmoeError
        )
