"""``flexmoe bench kernels``."""

import json

from typer.testing import CliRunner

from flexmoe.cli import app
from flexmoe.errors import FlexmoeError
from flexmoe.kernels import measure


def test_bench_measures_what_it_says_and_refuses_before(tmp_path):
    out = tmp_path / "kernels.json"
    command = "bench kernels --shape 4,64,32,2 --tokens 1,9 --repeats 1 --dtype float32"
    result = CliRunner().invoke(app, [*command.split(), "--device", "cpu", "-o", str(out)])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())
    assert [row["T"] for row in found["rows"]] == [1, 9]
    for row in found["rows"]:
        assert {"transformers eager", *measure.BUDGETS, *measure.MIXED} <= set(row["seconds"])
        assert min(row["seconds"].values()) > 0
        assert row["work"]["100 %"]["flop"] == row["T"] * 2 * 6 * 64 * 32
        half, machine = row["work"]["50 % ragged"], row["machine"]
        assert half["bytes"] < row["work"]["100 %"]["bytes"]
        least = half["flop"] / machine["flop_per_s"]
        assert half["roof_s"] == max(least, half["bytes"] / machine["bytes_per_s"])
        # in the rounds the machine is as fast as it was seen to be, or somewhat slower
        seen = found["machine"]
        assert 0.1 < machine["flop_per_s"] / seen["flop_per_s"]["float32"] < 2
        assert 0.1 < machine["bytes_per_s"] / seen["bytes_per_s"] < 2
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


def test_rounds_in_which_the_machine_was_slow_do_not_count(monkeypatch):
    rounds = iter([1, 9, 1, 1, 1, 9])  # the first is a look, how fast the machine is in the others

    def products():
        nonlocal now
        now = next(rounds)
        return 0.1

    now = 1
    monkeypatch.setattr(measure, "_times", lambda call, repeats, before: [call() * now])
    calls = {measure.PRODUCTS: products, "quick": lambda: 0.2, "slow": lambda: 3.0}
    found = measure._interleaved(calls, 5, {})
    assert found == {measure.PRODUCTS: 0.1, "quick": 0.2, "slow": 3.0}
