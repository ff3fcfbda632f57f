"""DiEP-style (arXiv 2509.16105): experts' and layers' importance, learned with all weights frozen.

Every layer has a number beta and every expert one, alpha. While they learn, the experts of a layer
count with beta x softmax(alpha), and the loss is the cross-entropy and a little of the distance of
the layers' outputs to their own. What is small in alpha x beta goes, whatever its layer.

The paper leaves open whether the router takes part in the relaxed layer. Here it does: an expert's
output is scaled by E x softmax(alpha) x beta, 1 at the start, so that learning begins at the model
itself and costs no more than training does. Distances are relative to the norm of the output, token
by token, and averaged over tokens and layers, so that the paper's weight for them suits models and
batches of any size. There is no official code.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.experts import ExpertLayer, expert_layers, experts_function, masked
from flexmoe.methods import Text, method
from flexmoe.progress import Steps
from flexmoe.statistics import token_loss
from flexmoe.training import batches

EPOCHS, WINDOWS, RATE, NEAR = 10, 16, 5e-3, 0.01  # the paper's, NEAR its lambda
TINY = 1e-30  # in place of the norm of an output that is zero
TURN = 4  # every fourth step is beta's, the others are alpha's


class _Outputs:
    """Keeps what the experts of every layer give while it is entered."""

    def __init__(self, layers: list[ExpertLayer]):
        self.layers, self.found = layers, dict[int, Tensor]()

    def __enter__(self) -> dict[int, Tensor]:
        def keep(index: int) -> object:
            def hook(module: nn.Module, args: object, output: Tensor) -> None:
                self.found[index] = output

            return hook

        self.hooks = [x.module.register_forward_hook(keep(x.index)) for x in self.layers]
        return self.found

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def loss_of(
    model: nn.Module, ids: Tensor, layers: list[ExpertLayer], scale: dict[int, Tensor]
) -> Tensor:
    """Cross-entropy, a mean over tokens, of the model whose experts are scaled by ``scale`` [E] of
    every layer, and `NEAR` x the mean over tokens and layers of how far outputs move, as norms."""
    with _Outputs(layers) as seen, torch.no_grad():
        model(input_ids=ids, use_cache=False)
        before = dict(seen)
    for layer in layers:
        layer.module.flexmoe_mask_EI = scale[layer.index][:, None].expand(-1, layer.I)
    with _Outputs(layers) as after, experts_function(model, "flexmoe_mask"):
        logits = model(input_ids=ids, use_cache=False).logits
    moved = [
        ((after[i] - y_TH).float().norm(dim=-1) / y_TH.float().norm(dim=-1).clamp_min(TINY)).mean()
        for i, y_TH in before.items()
    ]
    return token_loss(logits, ids) / ids[:, 1:].numel() + NEAR * torch.stack(moved).mean()


@method(
    "diep",
    paper="DiEP-style, arXiv:2509.16105",
    unit="expert",
    allocate="global",
    router="remove",
    learns=True,
)
def learn(model: nn.Module, text: Text) -> dict[int, Tensor]:
    """Learned importance of the expert in its layer x that of the layer."""
    layers, device = expert_layers(model), next(model.parameters()).device
    alpha = [torch.ones(x.E, device=device, requires_grad=True) for x in layers]
    beta = [torch.ones((), device=device, requires_grad=True) for _ in layers]
    turns = [torch.optim.Adam(alpha, lr=RATE), torch.optim.Adam(beta, lr=RATE)]
    steps = EPOCHS * -(-len(text.ids) // WINDOWS)
    drawn = batches(text.ids, WINDOWS, steps, text.seed)
    tokens = WINDOWS * text.ids.shape[1]
    model.requires_grad_(False)
    with masked(layers):
        for step in text.track(Steps(0, steps, tokens), "learn"):
            batch = next(drawn)
            for part in batch.to(device).split(text.batch_size):
                scale = {
                    x.index: b * x.E * F.softmax(a, dim=0)
                    for x, a, b in zip(layers, alpha, beta, strict=True)
                }
                loss = loss_of(model, part, layers, scale)
                (loss * len(part) / len(batch)).backward()
            turns[step % TURN == TURN - 1].step()
            for turn in turns:
                turn.zero_grad()
    return {
        x.index: (a * b).detach().double().cpu()
        for x, a, b in zip(layers, alpha, beta, strict=True)
    }
