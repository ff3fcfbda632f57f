"""A uniform export is an ordinary checkpoint to the tools around llama.cpp, too.

The file is written as llama.cpp's converter does it for Qwen3-MoE: the gguf package's own table of
names, the experts of a layer as one tensor, the width from config.json. (The converter itself is
not on the package index.) `llama_cpp` is optional: building it takes ten minutes.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from helpers import load, logits, random_plan, tensors

gguf = pytest.importorskip("gguf")

from flexmoe.exporter import export, write_family  # noqa: E402

LAYERS, EXPERTS, CHANNELS, HIDDEN, WIDTH = 2, 4, 64, 64, 32


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A uniform export at half of the width, a multiple of 32 as quantized types need it."""
    root = tmp_path_factory.mktemp("gguf")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=128,
        hidden_size=HIDDEN,
        intermediate_size=96,
        moe_intermediate_size=CHANNELS,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(root / "base")
    plan = random_plan(model, root / "base", (0.0, 0.5), quantum=32)
    write_family(root / "base", plan, root / "family")
    export(root / "family", root / "uniform", pruned=0.5, layout="uniform")
    return root / "uniform"


@pytest.fixture(scope="module")
def converted(exported: Path) -> Path:
    config = json.loads((exported / "config.json").read_text())
    path = exported.parent / "member.gguf"
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_context_length(64)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_expert_count(EXPERTS)
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")  # the test speaks in tokens
    for name, values in by_gguf_name(exported).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def by_gguf_name(exported: Path) -> dict[str, np.ndarray]:
    """The export's tensors under llama.cpp's names."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, LAYERS)
    found: dict[str, Any] = {}
    experts: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for name, tensor in tensors(exported).items():
        module = name.removesuffix(".weight")
        if ".experts." in module:
            before, number, side = module.rsplit(".", 2)
            experts[f"{before}.{side}"][int(number)] = tensor.float().numpy()
        else:
            found[module] = tensor.float().numpy()
    for module, of_expert in experts.items():
        found[module] = np.stack([of_expert[e] for e in sorted(of_expert)])
    return {f"{names.get_name(module)}.weight": values for module, values in found.items()}


def test_experts_have_the_width_that_the_file_says(exported: Path, converted: Path) -> None:
    reader = gguf.GGUFReader(converted)
    width = reader.fields["qwen3moe.expert_feed_forward_length"]
    assert int(width.parts[width.data[0]][0]) == WIDTH
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    for i in range(LAYERS):  # llama.cpp counts dimensions from the other end
        assert shapes[f"blk.{i}.ffn_gate_exps.weight"] == (HIDDEN, WIDTH, EXPERTS)
        assert shapes[f"blk.{i}.ffn_down_exps.weight"] == (WIDTH, HIDDEN, EXPERTS)
    wanted = by_gguf_name(exported)
    for tensor in reader.tensors:
        assert np.array_equal(np.array(tensor.data), wanted[tensor.name])


def test_llama_cpp_computes_what_transformers_does(exported: Path, converted: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    ids = torch.tensor([[5, 17, 40, 77, 90]])
    model = Qwen3MoeForCausalLM.from_pretrained(exported, dtype=torch.float32)
    wanted = logits(load(exported, model), ids)[0].numpy()
    llama = llama_cpp.Llama(
        str(converted), n_ctx=64, logits_all=True, verbose=False, n_threads=1, n_gpu_layers=0
    )
    llama.eval(ids[0].tolist())
    found = np.array(llama.scores[: ids.shape[1]])
    # its products round to float16 and its softmax is its own
    assert np.abs(found - wanted).max() < 2e-2 * np.abs(wanted).max()
    assert (found.argmax(-1) == wanted.argmax(-1)).all()
