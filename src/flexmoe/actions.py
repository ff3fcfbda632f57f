"""Learned widths as published: the action training of FlexMoE (arXiv 2606.27866, eq. 5-12).

Every expert has logits over actions "keep this share of my ranked channels". One run under rising
cost pressure walks from the full model to the poorest budget; a point of the path is recorded at
every percent. All weights are frozen; only L * E * A logits learn.

The paper leaves gaps; what is decided here and why (measurements: docs/log.md):

- C is divided by the number of layers, so that settings carry over between models.
- lambda is not a fixed ramp but follows the pruned share: it rises while the expected share is
  behind a straight line from 0 to the target. The run then reaches every budget in the given
  steps on any model, where a fixed ramp has to be tuned per model.
- The load share q is that of the student's pass of the same step, without gradient.
- CE and KL weigh the same, KL is teacher || student as in the paper's recovery stage.
- The margin of the thickest action is 3 (probability 0.87 with four actions), tau falls from 1 to
  0.3, beta from 0.1 to 0, Adam without weight decay.
- Exports along a path need not be nested; a running minimum makes them so (`widths_from_path`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flexmoe.errors import FlexmoeError
from flexmoe.experts import ExpertLayer, expert_layers, experts_function, masked
from flexmoe.progress import Steps, Track, silent
from flexmoe.training import batches, check_step

Path = list[tuple[float, dict[int, Tensor]]]


@dataclass(frozen=True)
class ActionConfig:
    """Settings of the run. ``target`` is the expected pruned share aimed at in the last step;
    ``load_floor`` mixes the load shares with a uniform one (0: the paper's form)."""

    actions: tuple[float, ...] = (0.1, 0.4, 0.7, 1.0)
    steps: int = 300
    lr: float = 0.1
    margin: float = 3.0
    tau: tuple[float, float] = (1.0, 0.3)
    beta: tuple[float, float] = (0.1, 0.0)
    target: float = 0.88
    load_floor: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise FlexmoeError(f"learning takes at least 1 step, found {self.steps}")


class Actions:
    """Trainable logits of one layer [E, A], thickest action first in favour."""

    def __init__(self, layer: ExpertLayer, config: ActionConfig):
        device = layer.module.down_proj.device
        self.layer = layer
        self.share_A = torch.tensor(config.actions, device=device)
        keep_A = torch.tensor([math.ceil(r * layer.I) for r in config.actions], device=device)
        self.keep_A = keep_A
        self.prefix_AI = (torch.arange(layer.I, device=device) < keep_A[:, None]).float()
        self.logits_EA = torch.zeros(layer.E, len(config.actions), device=device)
        self.logits_EA[:, self.share_A.argmax()] = config.margin
        self.logits_EA.requires_grad_(True)

    def sample(self, tau: float, generator: torch.Generator) -> Tensor:
        """Straight-through Gumbel mask [E, I]: hard in value, soft in gradient."""
        uniform_EA = torch.rand(self.logits_EA.shape, generator=generator).to(self.logits_EA.device)
        gumbel_EA = -torch.log(-torch.log(uniform_EA.clamp(1e-9, 1 - 1e-7)))
        soft_EA = torch.softmax((self.logits_EA + gumbel_EA) / tau, dim=1)
        hard_EA = F.one_hot(soft_EA.argmax(1), soft_EA.shape[1]).float()
        return (hard_EA - soft_EA).detach() @ self.prefix_AI + soft_EA @ self.prefix_AI

    @property
    def clean_EA(self) -> Tensor:
        """Action probabilities without noise and temperature."""
        return torch.softmax(self.logits_EA, dim=1)

    def cost(self, load_floor: float) -> Tensor:
        """Expected keep ratio weighted by the load share of the last pass, in [0.1, 1]."""
        load_E = self.layer.module.flexmoe_load_E.float()
        load_E = load_E / load_E.sum().clamp_min(1)
        load_E = (1 - load_floor) * load_E + load_floor / len(load_E)
        return (load_E * (self.clean_EA @ self.share_A)).sum()

    def entropy(self) -> Tensor:
        """Mean entropy of the experts' action probabilities."""
        return -(self.clean_EA * torch.log(self.clean_EA.clamp_min(1e-9))).sum(1).mean()

    def width(self) -> Tensor:
        """Channels kept by the most likely action of every expert [E]."""
        return self.keep_A[self.clean_EA.argmax(1)].cpu()

    def parameters(self) -> int:
        """Routed-expert parameters of the layer at these widths."""
        shape = self.layer.shape
        fixed = shape.experts * shape.fixed_parameters
        return int(self.width().sum()) * shape.channel_parameters + fixed


def quality_loss(student: Tensor, teacher: Tensor, ids: Tensor) -> Tensor:
    """Cross-entropy plus KL(teacher || student), both a mean over the predicted tokens."""
    tokens = ids[:, 1:].numel()
    log_student = F.log_softmax(student[:, :-1].flatten(0, 1).float(), dim=-1)
    log_teacher = F.log_softmax(teacher[:, :-1].flatten(0, 1).float(), dim=-1)
    divergence = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)
    return (F.nll_loss(log_student, ids[:, 1:].flatten(), reduction="sum") + divergence) / tokens


def learn_widths(
    model: nn.Module,
    ids: Tensor,
    config: ActionConfig,
    *,
    batch_size: int = 8,
    seed: int = 0,
    track: Track = silent,
) -> Path:
    """Train the actions of a *ranked* model on windows ``ids`` [n, t].

    Returns the path: (pruned share, widths [E] of every layer), a point whenever the hardened
    actions have pruned one percent more than at the last point. All weights are left frozen.
    """
    layers = expert_layers(model)
    actions = [Actions(layer, config) for layer in layers]
    optimizer = torch.optim.Adam([a.logits_EA for a in actions], lr=config.lr)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    size = sum(layer.shape.parameters for layer in layers)
    path: Path = []
    price, reached = 0.01, 0.0
    model.requires_grad_(False)
    drawn = batches(ids, batch_size, config.steps, seed)
    with masked(layers):
        for step in track(Steps(0, config.steps, batch_size * ids.shape[1]), "learn"):
            batch = next(drawn).to(device)
            progress = (step + 1) / config.steps
            tau = _between(config.tau, progress)
            with torch.no_grad():
                teacher = model(input_ids=batch, use_cache=False).logits
            for a in actions:
                a.layer.module.flexmoe_mask_EI = a.sample(tau, generator)
            with experts_function(model, "flexmoe_mask"):
                student = model(input_ids=batch, use_cache=False).logits
            quality = quality_loss(student, teacher, batch)
            cost = torch.stack([a.cost(config.load_floor) for a in actions]).mean()
            entropy = torch.stack([a.entropy() for a in actions]).mean()
            loss = quality + price * cost - _between(config.beta, progress) * entropy
            check_step(loss.detach())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            kept = torch.stack([(a.clean_EA.detach() @ a.share_A).mean() for a in actions]).mean()
            behind = progress * config.target - (1 - float(kept))
            price = max(price * math.exp(max(-0.5, min(0.5, 10 * behind))), 1e-3)
            width = {a.layer.index: a.width() for a in actions}
            share = 1 - sum(a.parameters() for a in actions) / size
            if share >= reached + 0.01:
                path.append((share, width))
                reached = share
    return path


def _between(ends: tuple[float, float], progress: float) -> float:
    return ends[0] + (ends[1] - ends[0]) * progress
