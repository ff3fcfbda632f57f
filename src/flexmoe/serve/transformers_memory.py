"""What of the served model is in memory, and the widths that fit in it."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from flexmoe import elastic
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.headers import one_line

log = logging.getLogger("flexmoe.serve")


class Memory:
    """``widths``: channels of every expert [E], by layer, for each row of the width tables (budgets
    rich to poor, then tasks). Writes the tables beside the experts modules."""

    def __init__(self, model: PreTrainedModel, widths: Sequence[dict[int, Tensor]]):
        self.model, self.widths, self.row = model, widths, 0
        self._write(None)

    def keep(self, row: int) -> int:
        """Have in memory what the budget in this row needs, and no more; returns the bytes given
        back, negative where some were read again. Other threads may go on computing. A
        `FlexmoeError` where they cannot be read: what had been read until then goes again. Where
        memory for what stays is missing, less is given back: the budgets are the poorer ones."""
        read = self._restore(self.widths[row]) if row < self.row else 0
        # before the channels go: a request whose client has left may run for some steps yet
        self._write(row)
        self.row = row
        before = elastic.stored_bytes(self.model)
        try:
            elastic.release(self.model)
        except (MemoryError, RuntimeError) as error:
            log.warning("not all that could go was given back: %s", one_line(error))
        return before - elastic.stored_bytes(self.model) - read

    def _restore(self, width: dict[int, Tensor]) -> int:
        try:
            return elastic.restore(self.model, width)
        except (FlexmoeError, MemoryError, OSError, RuntimeError) as error:  # torch's for memory
            elastic.release(self.model)
            if isinstance(error, FlexmoeError):
                raise
            raise FlexmoeError(f"the weights could not be read again: {one_line(error)}") from error

    def _write(self, row: int | None) -> None:
        for layer in expert_layers(self.model):
            rows = [width[layer.index] for width in self.widths]
            if row is not None:
                rows = [torch.minimum(width_E, rows[row]) for width_E in rows]
                layer.module.flexmoe_width_E = rows[row].tolist()
            layer.module.flexmoe_width_BE = [width_E.tolist() for width_E in rows]
