"""What decoder layers give for windows of text, and gradients of it, in files."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexmoe.errors import FlexmoeError

# What a decoder layer gives: hidden states [n, ...], or a tuple of such tensors and None.
Output: TypeAlias = Tensor | tuple[Tensor | None, ...]


def tensors_of(output: Output) -> list[Tensor | None]:
    """The parts of an output."""
    return list(output) if isinstance(output, tuple) else [output]


def same_form(output: Output, parts: Sequence[Tensor | None]) -> Output:
    """``parts`` in the form of ``output``."""
    if isinstance(output, tuple):
        return tuple(parts)
    assert parts[0] is not None
    return parts[0]


def check_output(output: Any, where: str) -> Output:
    """``output`` if it can be kept; else a `FlexmoeError`."""
    parts = output if type(output) is tuple else (output,)
    if not all(part is None or isinstance(part, Tensor) for part in parts) or parts[0] is None:
        raise FlexmoeError(
            f"{where} gives {type(output).__name__} of "
            f"{', '.join(type(part).__name__ for part in parts)}, expected hidden states or a "
            "tuple that begins with them: this model cannot be read layer by layer, leave out "
            "--memory"
        )
    return output


class Activations:
    """Outputs by name and window, one file for each, below ``path``; read to ``device``."""

    def __init__(self, path: Path, device: torch.device):
        self.path, self.device = path, device

    def write(self, name: str, windows: range, output: Output) -> None:
        """Keep an output for these windows, whose tensors are split along their first axis."""
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        parts = tensors_of(output)
        size = len(parts) if isinstance(output, tuple) else 0
        for at, window in enumerate(windows):
            own = {}
            for k, part in enumerate(parts):
                if part is not None:
                    rows = part.shape[0] // len(windows)
                    row = part.detach()[at * rows : (at + 1) * rows]
                    own[f"{k}/{size}"] = row.cpu().contiguous()
            save_file(own, folder / f"{window}.safetensors")

    def read(self, name: str, windows: range) -> Output:
        """What was kept for these windows."""
        files = [load_file(self.path / name / f"{window}.safetensors") for window in windows]
        places = [key.split("/") for key in files[0]]
        parts: list[Tensor | None] = [None] * max(1, int(places[0][1]))
        for k, size in places:
            parts[int(k)] = torch.cat([file[f"{k}/{size}"] for file in files]).to(self.device)
        return tuple(parts) if int(places[0][1]) else same_form(torch.empty(0), parts)

    def remove(self, name: str) -> None:
        """Nobody needs these any more."""
        shutil.rmtree(self.path / name, ignore_errors=True)
