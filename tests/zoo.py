"""Tiny random models of every mixture-of-experts architecture that transformers can build.

``DECODERS`` has one model type for each modelling file on the experts interface (the decorator
``@use_experts_implementation``), except for those in ``UNBUILDABLE``. The files are found by
reading the sources of the installed transformers, so that a newer one is picked up.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pathlib
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import (
    CONFIG_MAPPING,
    CONFIG_MAPPING_NAMES,
    model_type_to_module_name,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

# Where to look for the class of a model type, the best place first.
HEADS = (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

UNBUILDABLE: dict[str, str] = {
    "diffusion_gemma": "block diffusion: denoises a bidirectional canvas, logits are not causal",
    "openai_privacy_filter": "bidirectional token classifier without a language-model head",
}

OFF_INTERFACE: dict[str, str] = {
    "dbrx": "flat w1, v1 and w2 of shape [E*I, H] in its own loop over experts",
    "doge": "experts are single embedding rows picked per token, there is no FFN to narrow",
    "jetmoe": "JetMoeParallelExperts with input_linear and output_linear, and expert attention",
    "llama4_text": "runs every expert on every token and scales the inputs",
    "longcat_flash": "undecorated 3-D experts, mixed with identity (zero) experts",
    "nllb_moe": "encoder-decoder with a ModuleDict of dense FFNs",
    "step3p7": "undecorated 3-D experts with a limit for each layer",
    "switch_transformers": "encoder-decoder with a ModuleDict of dense FFNs",
    "vitpose_backbone": "vision backbone with a ModuleList of dense FFNs",
}

# One set of arguments for all text configurations: each takes the keys it has a field for.
# fmt: off
COMMON: dict[str, Any] = dict(
    vocab_size=64, vocab_size_per_layer_input=64, max_position_embeddings=64,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
    hidden_size=32, hidden_size_per_layer_input=8, num_hidden_layers=2, num_layers=2,
    # feed-forward: routed experts are 16 wide, shared ones too, dense layers 48
    moe_intermediate_size=16, expert_ffn_hidden_size=16, shared_expert_intermediate_size=16,
    shared_experts_intermediate_size=16, moe_shared_expert_intermediate_size=16,
    shared_intermediate_size=16, share_expert_dim=16, intermediate_size=48,
    dense_intermediate_size=48, intermediate_size_mlp=48, ffn_hidden_size=48,
    n_shared_experts=1, num_shared_experts=1, moe_num_shared_experts=1,
    # routing: 2 of 8 experts, in every layer
    num_experts=8, num_local_experts=8, n_routed_experts=8, moe_num_experts=8,
    num_experts_per_tok=2, num_experts_per_token=2, moe_k=2, moe_topk=2, top_k_experts=2,
    n_group=1, topk_group=1, router_hidden_size=64,
    first_k_dense_replace=0, num_dense_layers=0, moe_layer_start_index=0, mlp_only_layers=[],
    mlp_layer_types=["sparse", "sparse"], expert_layer_period=1, expert_layer_offset=0,
    # attention: plain, latent, windowed, indexed
    num_attention_heads=2, num_key_value_heads=2, head_dim=16, kv_channels=16,
    q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=16,
    swa_num_attention_heads=2, swa_num_key_value_heads=2, swa_head_dim=16, d_rel=4, rel_extent=16,
    o_groups=2, o_lora_rank=8, gated_norm_rank=4, hc_lowrank=8,
    index_topk=64, index_head_dim=16, index_n_heads=2,
    # linear attention and state space layers
    linear_head_dim=16, linear_num_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
    linear_num_key_heads=2, linear_num_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
    layer_group_size=2, ssm_state_size=8, n_groups=1, chunk_size=8, mamba_num_heads=4,
    mamba_head_dim=16, mamba_n_heads=4, mamba_d_state=8, mamba_chunk_size=8,
    # multipliers that would hide the experts' effect on the logits
    logit_scale=1.0, logits_mup_width_multiplier=1.0, output_multiplier=1.0,
)

# The same for vision and audio towers. They are built but never run.
TOWER: dict[str, Any] = dict(
    vocab_size=64, hidden_size=16, d_model=16, intermediate_size=16, encoder_ffn_dim=16, mlp_dim=16,
    depth=1, num_hidden_layers=1, encoder_layers=1, num_heads=2, num_attention_heads=2,
    encoder_attention_heads=2, num_key_value_heads=2, head_dim=8, image_size=16, patch_size=8,
    max_position_embeddings=16, num_position_embeddings=16, deepstack_visual_indexes=[0],
    global_attn_indexes=[0], out_hidden_size=32, output_dim=32, output_channels=16,
    downsample_channels=[16, 16], downsample_hidden_size=16, num_mel_bins=16,
    patch_sizes=[2], hidden_sizes=[16], depths=[1], projection_intermediate_size=16,
    projector_hidden_size=16,
)

# Both kinds of layer where an architecture mixes them: two layers would all be linear otherwise.
HYBRID: dict[str, Any] = dict(layer_types=["linear_attention", "full_attention"])

EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v4": dict(
        num_key_value_heads=1, partial_rotary_factor=0.5, mlp_layer_types=["hash_moe", "moe"],
    ),
    # widths of the text and of the vision experts, only the former see text
    "ernie4_5_vl_moe": dict(moe_intermediate_size=[16, 12], rope_parameters=dict(
        rope_type="default", rope_theta=1e4, mrope_section=[3, 3, 2],
    )),
    # global_head_dim: the last layer always has full attention with heads of its own size
    "gemma4_text": dict(
        enable_moe_block=True, global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "glm4v_moe": dict(rope_parameters=dict(
        rope_type="default", rope_theta=1e4, partial_rotary_factor=0.5, mrope_section=[2, 1, 1],
    )),
    "glm5_next": dict(qk_rope_head_dim=0, **HYBRID),  # its attention has no positions
    "granitemoehybrid": HYBRID,
    "kimi_linear": HYBRID,
    "lfm2_moe": dict(layer_types=["conv", "full_attention"]),
    "mimo_v2_flash": dict(head_dim=24, num_key_value_heads=1),  # a third of it is rotated
    "muse_spark": dict(moe_hidden_size=24),  # experts run at a width of their own
    "nemotron_h": dict(layers_block_type=["linear_attention", "moe", "full_attention", "moe"]),
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": dict(
        indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=16, indexer_budget=64,
        indexer_compress_ratio=4, **HYBRID,
    ),
    "zaya": dict(num_experts_per_tok=1),  # the only value it takes
    # off the interface
    "dbrx": dict(
        d_model=32, n_heads=2, n_layers=2, max_seq_len=64,
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(hidden_size=32, ffn_hidden_size=16, moe_num_experts=8, moe_top_k=2),
    ),
    "doge": dict(is_moe=True, num_experts=16, intermediate_size=48),
    "jetmoe": dict(num_key_value_heads=1),  # times top-k attention experts
    "longcat_flash": dict(num_layers=1, zero_expert_num=2, head_dim=8),
    "step3p7": dict(sliding_window=64),
}

# Beside the parts of a multimodal configuration: hub files have this one, masked inputs need it.
WRAPPER: dict[str, dict[str, Any]] = {
    "qwen3_omni_moe_thinker": dict(vision_start_token_id=151652),
}
# fmt: on


@functools.cache
def interface_files() -> list[str]:
    """Folders in transformers/models with a modelling file on the experts interface."""
    root = pathlib.Path(transformers.__file__).parent / "models"
    mark = b"@use_experts_implementation"
    return sorted({p.parent.name for p in root.glob("*/modeling_*.py") if mark in p.read_bytes()})


def folder_of(model_type: str) -> str:
    """The folder in transformers/models that a model type lives in."""
    return model_type_to_module_name(model_type)


def _decoder_in(folder: str) -> str | None:
    types = [t for t in CONFIG_MAPPING_NAMES if folder_of(t) == folder]
    for names in HEADS:
        here = sorted(t for t in types if t in names)
        if here:
            return next((t for t in here if t.endswith(("_text", "_thinker"))), here[0])
    return None


@functools.cache
def decoders() -> list[str]:
    """Model types to sweep over: one for each modelling file on the interface."""
    found = (_decoder_in(folder) for folder in interface_files() if folder not in UNBUILDABLE)
    return [t for t in found if t is not None]


DECODERS: list[str] = decoders()


def _take(config_class: type[PreTrainedConfig], values: dict[str, Any]) -> dict[str, Any]:
    known = {f.name for f in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    return {k: copy.deepcopy(v) for k, v in values.items() if k in known}


def _text(config_class: type[PreTrainedConfig], model_type: str) -> dict[str, Any]:
    kwargs = _take(config_class, COMMON)
    alias = config_class.attribute_map.get("intermediate_size") == "moe_intermediate_size"
    if alias or "moe_intermediate_size" not in kwargs:  # intermediate_size is the experts' width
        kwargs["intermediate_size"] = 16
    return kwargs | copy.deepcopy(EXTRA.get(model_type, {}))


def _tower(config_class: Any) -> dict[str, Any]:
    if config_class is transformers.AutoConfig:  # any vision tower will do
        return {"model_type": "pixtral"} | _take(CONFIG_MAPPING["pixtral"], TOWER)
    inner = {key: _tower(part) for key, part in config_class.sub_configs.items()}
    return _take(config_class, TOWER) | inner


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration with 2 layers, hidden size 32, and 2 of 8 experts that are 16 wide."""
    config_class = CONFIG_MAPPING[model_type]
    if "text_config" not in config_class.sub_configs:
        return config_class(**_text(config_class, model_type))
    text = _text(config_class.sub_configs["text_config"], model_type)
    beside = WRAPPER.get(model_type, {})
    return config_class(**(_tower(config_class) | beside | {"text_config": text}))


def model_class(model_type: str) -> type[PreTrainedModel]:
    """The class that maps ``input_ids`` to logits for a model type."""
    name = next(names[model_type] for names in HEADS if model_type in names)
    return getattr(transformers, name)


@torch.no_grad()
def filled(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """``model`` in float32 and eval mode, with random weights, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _fill(model.float().eval())
    return model


def _fill(model: PreTrainedModel) -> None:
    """Weights large enough for every part of the model to matter, as fresh ones are tiny."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") and (parameter.ndim == 1 or "correction" in name):
            parameter.normal_(0, 0.02)  # large ones would send all tokens to the same experts
        elif parameter.ndim > 1:
            parameter.normal_(0, 0.15)
        else:
            parameter.uniform_(0.8, 1.2)  # norms, scales, decay rates
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):  # fixed table from token to experts, all zero when fresh
            shuffled = torch.rand(buffer.shape[0], 8).argsort(dim=1)
            buffer.copy_(shuffled[:, : buffer.shape[1]])
        elif name.endswith(("bias", "biases")):  # correction biases, and zaya's -1 for "no expert"
            buffer.add_(0.02 * torch.randn_like(buffer) * (buffer == 0))


def tiny_model(model_type: str, seed: int = 0, vocab_size: int = 64) -> PreTrainedModel:
    """A random model in float32 and eval mode, the same for the same seed."""
    config = tiny_config(model_type)
    config.get_text_config().vocab_size = vocab_size
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = model_class(model_type)(config).float().eval()
        _fill(model)
    return model


def tiny_off_interface(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A model with experts that are not on the interface, which must be refused."""
    if model_type not in OFF_INTERFACE or not any(model_type in names for names in HEADS):
        raise ValueError(f"{model_type} can not be built as an off-interface decoder")
    return tiny_model(model_type, seed)
