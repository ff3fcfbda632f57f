"""Names and rules that need no torch: budgets, layouts of exports, and the steps widths go in."""

from __future__ import annotations

import math
from collections.abc import Sequence

# Shares of the routed-expert parameters that `compress` removes, if it is told no others.
BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
LAYOUTS = ("uniform", "ragged", "masked")  # of exports
# Grouped matrix products, the default of transformers and others, need rows of 16 bytes: bf16.
ALIGNED = 8


def default_quantum(channels: int) -> int:
    """32 for experts of 512 channels and more (tiles, tensor parallel shards, CPU vectors); about
    a thirty-second of the width for smaller ones."""
    return 32 if channels >= 512 else max(1, 2 ** ((channels // 32).bit_length() - 1))


def nearest_width(full: int, quantum: int, pruned: float) -> int:
    """The width of ``full`` channels at a pruned share: a multiple of ``quantum`` and `ALIGNED`."""
    step = math.lcm(quantum, ALIGNED)
    return min(full, max(1, round(full * (1 - pruned) / step)) * step)


def coupled_reason(path: Sequence[str], kinds: Sequence[str]) -> str:
    """Why no uniform export can be written where the config value at ``path`` also sets the width
    of other parameters (``kinds`` of them)."""
    return (
        f"uniform cannot be exported for this architecture: '{'.'.join(path)}' sets the width of "
        f"the routed experts and also of {', '.join(kinds)}. Use the layouts ragged or masked."
    )
