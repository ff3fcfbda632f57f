"""A dense model made into a mixture of fine-grained experts, as Qwen2-57B-A14B was."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import OlmoeConfig, OlmoeForCausalLM


@torch.no_grad()
def upcycle(
    dense: OlmoeForCausalLM, config: OlmoeConfig, windows: Tensor, seed: int
) -> OlmoeForCausalLM:
    """A mixture of shape ``config`` from a model of one expert (Qwen2 report, section 2.2.2).

    The FFN is repeated until its channels fill all experts, each copy is shuffled along the
    intermediate dimension and cut into experts, and half of the channels of each expert become
    random again, as spread as the learned ones. The router is random.

    The router's chosen weights sum to far less than 1 (``norm_topk_prob`` is off: about 4/16),
    and a token sees each learned channel in half of the cases only. So the experts of a layer are
    scaled to give outputs of the size that the dense FFN has on ``windows``; the output is linear
    in the up and in the down projection, each takes the square root.
    """
    torch.manual_seed(seed)
    model = OlmoeForCausalLM(config)
    kept = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    model.load_state_dict(kept, strict=False)
    model.to(dense.device)
    seen = _inputs_and_outputs(dense, windows.to(dense.device))
    for old, new, (inputs, outputs) in zip(
        dense.model.layers, model.model.layers, seen, strict=True
    ):
        _cut(old.mlp.experts, new.mlp.experts)
        scale = (outputs.square().mean() / new.mlp(inputs).square().mean()).sqrt()
        channels = new.mlp.experts.intermediate_dim
        new.mlp.experts.gate_up_proj[:, channels:] *= scale.sqrt()
        new.mlp.experts.down_proj *= scale.sqrt()
    return model


def _inputs_and_outputs(model: OlmoeForCausalLM, windows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What goes into and comes out of the FFN of every layer."""
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [
        layer.mlp.register_forward_hook(
            lambda _, inputs, output: seen.append((inputs[0].float(), output.float()))
        )
        for layer in model.model.layers
    ]
    model(input_ids=windows, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def _cut(old: torch.nn.Module, new: torch.nn.Module) -> None:
    """Fill the experts ``new`` with the channels of the one expert ``old``."""
    experts, channels = new.num_experts, new.intermediate_dim
    width = old.intermediate_dim
    copies = -(-experts * channels // width)
    order = torch.cat([torch.randperm(width) for _ in range(copies)])[: experts * channels]
    order = order.view(experts, channels).to(old.down_proj.device)
    again = torch.rand(experts, channels).argsort(1) < channels // 2  # exactly half of each
    again = again.to(old.down_proj.device)

    gate, up = old.gate_up_proj[0].chunk(2)
    down = old.down_proj[0].T
    parts = []
    for matrix in (gate, up, down):  # all [width, hidden]: a row is a channel
        rows = matrix[order]
        noise = torch.randn(rows.shape).to(rows.device) * matrix.std()
        parts.append(torch.where(again[..., None], noise, rows))
    new.gate_up_proj.copy_(torch.cat(parts[:2], 1))
    new.down_proj.copy_(parts[2].transpose(1, 2))
