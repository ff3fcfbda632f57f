"""Tiny random models of the architectures served, as families, plans and exports on disk.

    python tests/on_vllm/served.py FOLDER ARCHITECTURE...

Writes FOLDER/ARCHITECTURE/{base,family,plan,ragged,uniform,patterns} and the tokens that
transformers generates, greedily and in float32, with the pruned channels of the base model masked.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parents[1]))

from chat import TEMPLATE
from flexmoe.checkpoint import Checkpoint, meta_model
from flexmoe.experts import expert_layers, experts_function
from flexmoe.exporter import export, write_family
from flexmoe.plan import Plan
from flexmoe.premoe import compile_plan
from flexmoe.premoe.pattern import Reach
from flexmoe.premoe.signature import signatures
from flexmoe.trace import fingerprint, trace
from helpers import random_plan
from patterns import made_pattern

BUDGETS = (0.0, 0.2, 0.4, 0.6)
RAGGED = 0.4
TASKS, KEEP = ("code", "tale"), 0.5  # the first prompts are text of theirs
PROMPTS, PROMPT_TOKENS, NEW_TOKENS, VOCABULARY = 16, 9, 32, 512
# vLLM's attention on CPU wants heads of 32 channels or more
COMMON: dict[str, Any] = dict(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=1024,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    tie_word_embeddings=False,
    num_experts_per_tok=2,
)
# their width key sets the shared expert too
COUPLED = ("deepseek_v2", "deepseek_v3", "ernie4_5_moe")
# vLLM's latent attention on CPU has kernels for kv_lora_rank + qk_rope_head_dim = 576 only
LATENT: dict[str, Any] = dict(
    q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32
)
ARCHITECTURES: dict[str, Any] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **COMMON,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        moe_intermediate_size=64,
        num_experts=8,
        norm_topk_prob=True,
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        **COMMON,
        num_key_value_heads=2,
        intermediate_size=128,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=96,
        num_experts=8,
        decoder_sparse_step=1,
    ),
    "olmoe": lambda: transformers.OlmoeConfig(
        **COMMON, num_key_value_heads=4, intermediate_size=64, num_experts=8
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=64, num_local_experts=8
    ),
    "granitemoe": lambda: transformers.GraniteMoeConfig(
        **COMMON, num_key_value_heads=2, intermediate_size=64, num_local_experts=8
    ),
    "ernie4_5_moe": lambda: transformers.Ernie4_5_MoeConfig(
        **COMMON,
        num_key_value_heads=2,
        intermediate_size=128,
        moe_intermediate_size=64,
        moe_num_experts=8,
        moe_num_shared_experts=1,
        moe_layer_start_index=1,
    ),
    "deepseek_v2": lambda: transformers.DeepseekV2Config(
        **COMMON,
        **LATENT,
        num_key_value_heads=4,
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=8,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        topk_method="group_limited_greedy",
        first_k_dense_replace=1,
        routed_scaling_factor=4.0,
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **COMMON,
        **{**LATENT, "q_lora_rank": 48},
        num_key_value_heads=4,
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=8,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        topk_method="noaux_tc",
        scoring_func="sigmoid",
        first_k_dense_replace=1,
        routed_scaling_factor=2.5,
        norm_topk_prob=True,
        num_nextn_predict_layers=0,
    ),
}
# biased experts, an activation that is clamped, and a fused layout
REFUSED: dict[str, Any] = {
    "gpt_oss": lambda: transformers.GptOssConfig(
        **COMMON, num_key_value_heads=2, head_dim=32, intermediate_size=64, num_local_experts=8
    )
}


def prompts() -> list[list[int]]:
    """Prompts of ordinary tokens."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(3, VOCABULARY, (PROMPTS, PROMPT_TOKENS), generator=generator).tolist()


def make(name: str, folder: Path) -> None:
    """All that is served of one architecture, and what must come out."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config({**ARCHITECTURES, **REFUSED}[name]()).float().eval()
    with torch.no_grad():  # spread the logits, so that no two tokens are a rounding error apart
        model.lm_head.weight.normal_(0, 0.3)
        for parameter_name, parameter in model.named_parameters():
            if "experts" in parameter_name and parameter.dim() == 3:
                parameter.normal_(0, 0.15)
            elif parameter_name.endswith("gate.weight"):
                parameter.normal_(0, 0.3)
            elif parameter_name.endswith("e_score_correction_bias"):
                parameter.normal_(0, 0.1)
    base = folder / name / "base"
    model.generation_config.eos_token_id = None
    model.save_pretrained(base)
    tokenizer().save_pretrained(base)
    plan = random_plan(model, base, BUDGETS, quantum=8)
    checkpoint = Checkpoint(base)
    of_base = fingerprint(checkpoint, trace(checkpoint, meta_model(base)))
    recipe = plan.recipe.model_copy(update={"weights_sha256": of_base})
    plan = dataclasses.replace(plan, recipe=recipe)
    write_family(base, plan, folder / name / "family")
    plan.save(folder / name / "plan")
    family = folder / name / "family"
    export(family, folder / name / "ragged", pruned=RAGGED, layout="ragged")
    if name not in COUPLED:
        export(family, folder / name / "uniform", pruned=RAGGED, layout="uniform")
    tokens = {f"{share * 100:g}": masked_tokens(model, plan, share) for share in BUDGETS}
    (folder / name / "tokens.json").write_text(json.dumps(tokens))
    tokens = make_patterns(model, base, folder / name / "patterns")
    (folder / name / "of_tasks.json").write_text(json.dumps(tokens))


def make_patterns(model: PreTrainedModel, base: Path, store: Path) -> dict[str, list[list[int]]]:
    """A store of patterns with random scores, and what the model generates at each."""
    store.mkdir()
    found = {}
    for seed, task in enumerate(TASKS):
        signature_E = signatures(model, torch.tensor(prompts()[seed])[None])[0]
        near = (Reach(tokens=16, prompts=20, distance=1e-3),)
        pattern = made_pattern(task, base, seed)
        spread = {16: pattern.spread[16]}
        pattern = dataclasses.replace(pattern, signature_E=signature_E, reach=near, spread=spread)
        pattern.save(store)
        plan = compile_plan([pattern], KEEP)
        found[task] = masked_tokens(model, plan, plan.budgets[-1])
    return found


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for every number, so that prompts can be told as text, too."""
    words = ["<pad>", "<s>", "</s>", *(f"t{n}" for n in range(3, VOCABULARY))]
    whole = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<pad>"))
    whole.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=whole, **special)
    fast.chat_template = TEMPLATE
    return fast


def masked_tokens(model: PreTrainedModel, plan: Plan, share: float) -> list[list[int]]:
    """What the unranked model generates with the channels that go at ``share`` set to zero."""
    widths = plan.widths(share)
    for layer in expert_layers(model):
        order_EI = plan.order[layer.index].long()
        kept_EI = torch.arange(layer.I) < widths[layer.index][:, None]
        layer.module.flexmoe_mask_EI = torch.zeros(layer.E, layer.I).scatter_(
            1, order_EI, kept_EI.float()
        )
    with experts_function(model, "flexmoe_mask"):
        return greedy(model)


def stock_tokens(checkpoint: Path) -> list[list[int]]:
    """What stock transformers generates from a checkpoint."""
    return greedy(AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval())


@torch.no_grad()
def greedy(model: PreTrainedModel) -> list[list[int]]:
    """The most likely new tokens after every prompt."""
    ids = torch.tensor(prompts())
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    return found[:, ids.shape[1] :].tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("architectures", nargs="+", choices=tuple(ARCHITECTURES))
    asked = parser.parse_args()
    for name in asked.architectures:
        shutil.rmtree(asked.folder / name, ignore_errors=True)
        make(name, asked.folder)
