"""vLLM generates, token for token, what transformers does with the pruned channels masked.

Every case is a process of its own, float32, greedy, 16 prompts of 32 new tokens: every budget
alone, all budgets mixed in one batch, and prompts that name none.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from served import (
    ARCHITECTURES,
    BUDGETS,
    KEEP,
    PROMPTS,
    RAGGED,
    TASKS,
    make,
    stock_tokens,
)

from flexmoe.serve.ids import label

LABELS = [label(share) for share in BUDGETS]
# else vLLM asks for 92 % of the memory, which other work may hold
LITTLE = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}


@dataclass(frozen=True)
class Case:
    """``model`` is the folder served (``stock``: the base model without a plan), ``shares`` the
    budgets that are, the richest first; with ``tasks``, those of the patterns beside them."""

    architecture: str
    model: str = "family"
    llm: dict[str, Any] = field(default_factory=dict)
    shares: tuple[float, ...] = BUDGETS
    tasks: bool = False

    def __str__(self) -> str:
        tasks = ["tasks"] if self.tasks else []
        return "-".join([self.architecture, self.model, *self.llm, *tasks])

    @property
    def labels(self) -> list[str]:
        return [label(share) for share in self.shares] + list(TASKS if self.tasks else ())


TP = {"tensor_parallel_size": 2}
LATENT = {"attention_config": {"backend": "CPU_MLA"}}  # that of AMX has no float32
CASES = [
    *(Case(name, llm=LATENT if "deepseek" in name else {}) for name in ARCHITECTURES),
    Case("qwen2_moe", "ragged", shares=(RAGGED,)),
    Case("mixtral", "ragged", shares=(RAGGED,)),
    Case("granitemoe", "ragged", shares=(RAGGED,)),  # the experts of a layer in one tensor
    Case("deepseek_v2", "ragged", LATENT, shares=(RAGGED,)),
    Case("deepseek_v2", "base", LATENT),
    Case("olmoe", "base"),
    Case("qwen3_moe", shares=(0.2, 0.4)),
    Case("mixtral", llm=TP),
    Case("deepseek_v3", llm={**LATENT, **TP, "enable_expert_parallel": True}),
    Case("qwen3_moe", llm={"enforce_eager": False}),
    Case("qwen2_moe", llm={"model_impl": "transformers"}),
    Case("qwen3_moe", tasks=True),
    Case("deepseek_v2", "base", LATENT, tasks=True),
    Case("mixtral", "stock", {**TP, "enable_expert_parallel": True}, shares=(0.0,), tasks=True),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("served")
    for name in ARCHITECTURES:
        make(name, root)
    return root


def settings(case: Case, folder: Path) -> dict[str, Any]:
    """A family needs no more than the name of the method: its plan lies beside the weights."""
    asked: dict[str, Any] = {}
    if case.model == "base":
        asked["plan"] = str(folder / case.architecture / "plan")
    if case.shares != BUDGETS:
        asked["shares"] = case.shares
    if case.tasks:
        asked |= {"patterns": str(folder / case.architecture / "patterns"), "keep": KEEP}
    served = case.model in ("base", "family", "stock")
    more: dict[str, Any] = {"quantization": "flexmoe"}
    if asked:
        more["hf_overrides"] = {"quantization_config": {"quant_method": "flexmoe", **asked}}
    labels = case.labels
    mixed = [labels[n % len(labels)] for n in range(PROMPTS)]
    runs = [[budget] * PROMPTS for budget in labels] + [mixed, [None] * PROMPTS]
    return {"llm": {**case.llm, **(more if served else {})}, "runs": runs}


def generate(model: Path, asked: dict[str, Any], tmp_path: Path, **env: str) -> list[Any]:
    out, how = tmp_path / "out.json", tmp_path / "how.json"
    how.write_text(json.dumps(asked))
    script = Path(__file__).with_name("run_offline.py")
    ranks = TWO_RANKS if "tensor_parallel_size" in asked["llm"] else {}
    done = subprocess.run(
        [sys.executable, str(script), str(model), str(out), str(how)],
        env={**LITTLE, **ranks, **env},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_equal_the_masked_model(case: Case, folder: Path, tmp_path: Path) -> None:
    wanted = json.loads((folder / case.architecture / "tokens.json").read_text())
    assert len({json.dumps(tokens) for tokens in wanted.values()}) == len(LABELS)
    wanted |= json.loads((folder / case.architecture / "of_tasks.json").read_text())
    asked = settings(case, folder)
    model = "base" if case.model == "stock" else case.model
    found = generate(folder / case.architecture / model, asked, tmp_path)
    for budgets, tokens in zip(asked["runs"], found, strict=True):
        for n, budget in enumerate(budgets):
            assert tokens[n] == wanted[budget or label(case.shares[0])][n], (budget, n)


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v2"])
def test_bfloat16_is_served_too(name: str, folder: Path, tmp_path: Path) -> None:
    """With kernels of its own, where the processor has them. Of tokens only the first can be
    compared: roundings add up."""
    wanted = json.loads((folder / name / "tokens.json").read_text())
    labels = [LABELS[n % len(LABELS)] for n in range(PROMPTS)]
    asked = {"llm": {"quantization": "flexmoe", "dtype": "bfloat16"}, "runs": [labels]}
    (found,) = generate(folder / name / "family", asked, tmp_path)
    equal = [found[n][0] == wanted[label][n][0] for n, label in enumerate(labels)]
    assert sum(equal) >= 0.7 * PROMPTS, equal


def test_stock_vllm_serves_a_uniform_export(folder: Path, tmp_path: Path) -> None:
    """Without any of our plug-ins."""
    export = folder / "olmoe" / "uniform"
    asked = {"llm": {}, "runs": [[None] * PROMPTS]}
    assert generate(export, asked, tmp_path, VLLM_PLUGINS="") == [stock_tokens(export)]


def test_stock_vllm_serves_a_family_at_full_width(folder: Path, tmp_path: Path) -> None:
    """A family is a stock checkpoint; the tables beside its weights disturb nobody."""
    family = folder / "mixtral" / "family"
    wanted = json.loads((folder / "mixtral" / "tokens.json").read_text())["0"]
    asked = {"llm": {}, "runs": [[None] * PROMPTS]}
    assert generate(family, asked, tmp_path, VLLM_PLUGINS="") == [wanted]


def test_what_cannot_be_served_is_refused(folder: Path, tmp_path: Path) -> None:
    family, plan = folder / "olmoe" / "family", folder / "olmoe" / "plan"
    other = folder / "mixtral" / "plan"

    def asked(**more: Any) -> dict[str, Any]:
        return {"hf_overrides": {"quantization_config": {"quant_method": "flexmoe", **more}}}

    bad = {
        "no plan": ({"model": str(folder / "olmoe" / "base"), **asked()}, "flexmoe.json"),
        "another model's plan": ({"model": str(family), **asked(plan=str(other))}, "mixtral"),
        "out of reach": ({"model": str(family), **asked(shares=[0.9])}, "reaches from 0 to 0.6"),
        "not the plan's weights": (
            {"model": str(family), **asked(plan=str(plan))},  # ranked already
            "weights",
        ),
    }
    out, how = tmp_path / "out.json", tmp_path / "how.json"
    how.write_text(json.dumps({name: llm for name, (llm, _) in bad.items()}))
    script = Path(__file__).with_name("run_refused.py")
    done = subprocess.run(
        [sys.executable, str(script), str(out), str(how)],
        capture_output=True,
        text=True,
        env=LITTLE,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    messages = json.loads(out.read_text())
    for name, (_, words) in bad.items():
        assert words in messages[name], (name, messages[name])
    make("gpt_oss", tmp_path)
    llm = {"model": str(tmp_path / "gpt_oss" / "family"), "quantization": "flexmoe"}
    for implementation, words in (
        ("vllm", "experts with biases and the activation 'swigluoai': not supported on vLLM yet"),
        ("transformers", "outside of its own MoE layers, where budgets do not reach them"),
    ):
        how.write_text(json.dumps({"gpt_oss": {**llm, "model_impl": implementation}}))
        done = subprocess.run(
            [sys.executable, str(script), str(out), str(how)],
            capture_output=True,
            text=True,
            env=LITTLE,
        )
        assert json.loads(out.read_text())["gpt_oss"] != "opened"
        assert words in done.stdout + done.stderr  # a worker says it
    without = {**LITTLE, "VLLM_PLUGINS": ""}
    how.write_text(json.dumps({"ragged": {"model": str(folder / "olmoe" / "ragged")}}))
    subprocess.run([sys.executable, str(script), str(out), str(how)], env=without, check=True)
    assert "Unknown quantization method: flexmoe" in json.loads(out.read_text())["ragged"]
