"""Ragged experts: one signature, several back ends.

`experts` computes a MoE layer whose experts have widths of their own, and a budget of its own for
every token where asked for. Engines call this function only; which back end runs is decided here.
"""

from flexmoe.kernels.interface import Kept, Weights, check_forced, experts

__all__ = ["Kept", "Weights", "check_forced", "experts"]
