"""The reference models by name: shape and training settings, and nothing computed."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import OlmoeConfig


@dataclass(frozen=True)
class Recipe:
    """A small OLMoE and how it is trained. ``tokens`` is the default of ``train.py --tokens``."""

    experts: int
    channels: int
    tokens: int
    top_k: int = 4
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 4096
    context: int = 1024

    # Upcycling: a dense model of this FFN width learns from the first share of the tokens.
    dense_channels: int | None = None
    dense_share: float = 0.6

    window: int = 256
    windows_per_step: int = 16
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.97)
    weight_decay: float = 0.05  # matrices only
    warm_up: int = 100  # steps, of each stage
    decay: float = 0.4  # the last share of the steps, linearly to zero
    clip: float = 1.0
    aux_loss: float = 0.01
    domain_power: float = 0.85  # domains are drawn in proportion to tokens ** this
    seed: int = 0

    def config(self, stage: str = "moe") -> OlmoeConfig:
        """The architecture: as recipe, or with one always chosen expert in stage ``dense``."""
        dense = stage == "dense"
        return OlmoeConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.dense_channels if dense else self.channels,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            num_experts=1 if dense else self.experts,
            num_experts_per_tok=1 if dense else self.top_k,
            max_position_embeddings=self.context,
            tie_word_embeddings=True,
            norm_topk_prob=False,  # as OLMoE: weights of the chosen experts sum to less than 1
            router_aux_loss_coef=self.aux_loss,
            bos_token_id=0,
            eos_token_id=0,
            pad_token_id=0,
        )


RECIPES = {
    "olmoe": Recipe(experts=16, channels=64, tokens=8_000_000),
    "olmoe-experts": Recipe(experts=64, channels=64, tokens=5_000_000),
    "olmoe-wide": Recipe(experts=16, channels=256, tokens=5_000_000),
    "olmoe-upcycled": Recipe(experts=16, channels=64, tokens=5_000_000, dense_channels=256),
    # For a GPU: 51M parameters, 47M of them in experts.
    "olmoe-50m": Recipe(
        experts=32,
        channels=256,
        tokens=200_000_000,
        layers=6,
        hidden=320,
        heads=5,
        kv_heads=5,
        windows_per_step=64,
        lr=1.5e-3,
    ),
}
