"""The budget of every token in the batch that a worker is about to compute.

The runner writes it before the model runs, the experts of every layer read it: one tensor at a
fixed address, so that what was captured or compiled once goes on reading it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

token_budget_T: Tensor | None = None  # int32, row of the width tables for each token
single: int | None = 0  # the row of all tokens, None where the batch mixes budgets


def reserve(tokens: int, device: torch.device) -> None:
    """Make room for batches of so many tokens, once, before anything is captured."""
    global token_budget_T
    if token_budget_T is None or len(token_budget_T) < tokens:
        token_budget_T = torch.zeros(tokens, dtype=torch.int32, device=device)


def fill(row_T: np.ndarray) -> None:
    """Say which row of the width tables each token of the coming batch is at."""
    global single
    assert token_budget_T is not None
    row_T = row_T.astype(np.int32, copy=False)
    single = int(row_T[0]) if len(row_T) and (row_T == row_T[0]).all() else None
    rows_T = torch.from_numpy(row_T)
    if token_budget_T.is_cuda:  # else the copy waits until the batch before is computed
        rows_T = rows_T.pin_memory()  # torch keeps it as long as it is being read
    token_budget_T[: len(row_T)].copy_(rows_T, non_blocking=True)
