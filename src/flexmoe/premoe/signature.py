"""Signature: what text looks like to the first MoE layer's router.

The mean of its raw logits over the tokens. PreMoe's first version takes the layer's TCESS vector,
where a token counts with its largest logit only; all logits tell tasks apart as well and unknown
text better (``bench/premoe.py`` measures both).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flexmoe.around import Reads, around_experts
from flexmoe.experts import Enough, expert_layers
from flexmoe.premoe.nearness import distances, spread
from flexmoe.premoe.pattern import Reach
from flexmoe.progress import Track, silent
from flexmoe.streamed.layer_loader import LayerLoader

WITHIN = 0.95  # share of a task's own text that is to be known again
SHORTEST = 16  # tokens of the shortest prompts whose reach is measured


def router_logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Raw logits float32 [n, t, E] of the first MoE layer's router for prompts ``ids`` [n, t].

    The forward pass ends where that layer's experts begin: of the model only what stands before
    them must be in memory. Raises `FlexmoeError` where the layer has no router that can be read.
    """
    layer = expert_layers(model)[0]

    def stop(module: nn.Module, args: Any) -> None:
        raise Enough

    with around_experts([layer], [Reads(("router",))]) as around, torch.no_grad():
        handle = layer.module.register_forward_pre_hook(stop)
        try:
            model(input_ids=ids.to(model.device), use_cache=False)
        except Enough:
            pass
        finally:
            handle.remove()
        return around[layer.index].logits_TE(ids.numel()).view(*ids.shape, -1)


def signatures(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The signature float64 [n, E] of each of the prompts ``ids`` [n, t], on the CPU."""
    return router_logits(model, ids).double().mean(1).cpu()


@contextmanager
def front(path: Path, device: torch.device) -> Iterator[PreTrainedModel]:
    """A checkpoint's model of which embeddings and decoder layers up to the first router are in
    memory, no experts: enough for `signatures`."""
    loader = LayerLoader(path, device, torch.float32 if device.type == "cpu" else None)
    with loader, ExitStack() as stack:
        for index in range(min(loader.experts) + 1):
            stack.enter_context(loader.resident(index, experts=False))
        yield loader.model


def mean_signature(
    model: PreTrainedModel, ids: Tensor, batch_size: int, track: Track = silent
) -> Tensor:
    """The signature float64 [E] of all windows ``ids`` [n, t] together."""
    parts = [signatures(model, part) for part in track(ids.split(batch_size), "signature")]
    return torch.cat(parts).mean(0)


def measure_reach(
    model: PreTrainedModel,
    ids: Tensor,
    held_out: Tensor,
    signature_E: Tensor,
    batch_size: int,
    track: Track = silent,
) -> tuple[tuple[Reach, ...], dict[int, Tensor]]:
    """How far from a task's signature its own text lies, by the length of the prompt: windows
    [n, t] are cut into prompts of 16, 32, 64 ... t tokens. Those of ``ids`` say how they spread
    (`nearness.spread` [E, E] of each length), the ``held_out`` ones how far they reach.

    The reach is split conformal prediction's: the ceil(0.95 (n + 1))-th smallest distance of n
    prompts', within which another prompt of the task lies with a probability of 0.95 (Lei et al.,
    2018, Distribution-free predictive inference for regression); the largest where n is below 19.
    """
    found, spreads = [], {}
    for tokens in track(prompt_lengths(ids.shape[1]), "reach"):
        own_nE, other_nE = (
            _of_prompts(model, windows, tokens, batch_size) for windows in (ids, held_out)
        )
        spreads[tokens] = spread(own_nE, signature_E)
        nearest = distances(other_nE, signature_E, spreads[tokens]).sort().values
        n = len(nearest)
        at = min(n, math.ceil(WITHIN * (n + 1))) - 1
        found.append(Reach(tokens=tokens, prompts=n, distance=float(nearest[at])))
    return tuple(found), spreads


def _of_prompts(model: PreTrainedModel, ids: Tensor, tokens: int, batch_size: int) -> Tensor:
    """Signatures [n, E] of the prompts of so many tokens that windows ``ids`` are cut into."""
    window = ids.shape[1]
    prompts = ids[:, : window // tokens * tokens].reshape(-1, tokens)
    step = max(1, batch_size * window // tokens)
    return torch.cat([signatures(model, part) for part in prompts.split(step)])


def prompt_lengths(window: int) -> Sequence[int]:
    """Powers of two from `SHORTEST` on that are shorter than a window, and the window's own."""
    powers = [SHORTEST * 2**k for k in range(window.bit_length())]
    return [*(tokens for tokens in powers if tokens < window), window]
