"""Closed-form recovery of a model larger than memory: `flexmoe.refit` with one layer in memory.

All windows go through one decoder layer after the other, as in `streaming`. An MoE layer's second
moments are gathered on the way, its down projections refitted and written to a file before the
next layer is read: what a layer gives is that of the original weights, so all layers see the
unpruned original model, as they do in `refit`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flexmoe.data import Windows
from flexmoe.evidence import Evidence
from flexmoe.experts import experts_function
from flexmoe.memory import MicroBatch
from flexmoe.plan import Plan
from flexmoe.progress import Steps, Track, silent
from flexmoe.refit import DAMPING, Moments, budget_weights, refit_layer
from flexmoe.resume import Saved
from flexmoe.shards import Shards, Source, down_replaced
from flexmoe.streamed.activations import Activations
from flexmoe.streamed.fit import check_memory, pick_sizes
from flexmoe.streamed.layer_loader import LayerLoader
from flexmoe.streamed.streaming import Pass
from flexmoe.training import CHUNK


@dataclass(kw_only=True)
class RefitPass(Pass):
    """Only forward steps; each leaves the new down projections of its layer in the folder ``out``.
    ``ranked``: the checkpoint's channels are in the plan's order already."""

    plan: Plan
    ranked: bool
    out: Path

    def forward(self, index: int, found: Evidence) -> None:
        """What layer ``index`` gives; refitted afterwards. Where memory runs out on the way, it
        begins again with fewer windows at a time: moments that were half added up are lost."""
        with self.loader.resident(index), torch.no_grad():
            layer = self.loader.experts.get(index)
            if layer is None:
                self.micro.run(partial(self._through, index), self.batch_size)
                return
            if not self.ranked:
                layer.permute_(self.plan.order[index].long())
            moments = self.micro.run(partial(self._gathered, index), self.batch_size)
            weight_B = budget_weights(None, self.plan.budgets)
            refit_layer(layer, moments, self.plan.width[index], weight_B, DAMPING)
            down = {"down_proj": layer.module.down_proj.detach().cpu().contiguous()}
            self.out.mkdir(parents=True, exist_ok=True)
            save_file(down, self.out / f"{index}.safetensors")

    def _gathered(self, index: int, size: int) -> Moments:
        layer = self.loader.experts[index]
        layer.module.flexmoe_observer = moments = Moments(layer, last=False)
        try:
            self._through(index, size)
        finally:
            del layer.module.flexmoe_observer
        return moments

    def _through(self, index: int, size: int) -> None:
        for batch in self.batches:
            for start in range(batch.places.start, batch.places.stop, size):
                self._forward_part(index, range(start, min(start + size, batch.places.stop)))


def refit_within(
    memory: int,
    loader: LayerLoader,
    plan: Plan,
    ids: Tensor,
    *,
    ranked: bool,
    batch_size: int,
    saved: Saved,
    track: Track = silent,
) -> Path:
    """The folder of new down projections, a file for each MoE layer, for calibration windows
    ``ids`` [n, t], with no more than ``memory`` bytes held; ``saved`` keeps the state after every
    layer. They are those of `flexmoe.refit.refit` but for the rounding of other micro-batches."""
    layers = loader.experts.values()
    moments = max(4 * layer.E * layer.I * (layer.I + layer.H) for layer in layers)
    check_memory(loader, memory, beside=("second moments", moments))
    folder = saved.work.path / "refit"

    def make(windows: Windows, files: Activations, micro: MicroBatch, out: Path) -> RefitPass:
        size = min(batch_size, len(windows.ids))
        return RefitPass(
            loader, windows, (), files, size, micro, CHUNK, plan=plan, ranked=ranked, out=out
        )

    windows = Windows(ids, "", ("",), torch.zeros(len(ids)))
    done, micro = 0, MicroBatch(batch_size)
    if (state := saved.load()) is not None:
        done, micro.size = state[0], int(state[1]["micro_batch"])
    else:
        trial = folder.with_name("rehearsal")
        sizes = pick_sizes(
            memory,
            loader,
            windows,
            lambda some, files, micro: make(some, files, micro, trial),
            batch_size,
            trial,
        )
        micro.size = int(sizes["micro_batch"])
        saved.save(0, {"micro_batch": torch.tensor(micro.size)})
    files = Activations(saved.work.path / "activations", loader.device)
    streamed = make(windows, files, micro, folder)
    nothing = streamed.empty()
    with experts_function(loader.model, "flexmoe_observe"):
        steps = streamed.steps()
        for at in track(Steps(done, len(steps), ids.numel() / len(steps)), "refit"):
            step, index = steps[at]
            step(index, nothing)
            done += 1
            saved.save(done, {"micro_batch": torch.tensor(micro.size)})
            streamed.forget(step, index)
    return folder


def refitted(source: Source, plan: Plan, ranked: bool, folder: Path) -> Shards:
    """The checkpoint's tensors, channels in the plan's order, with the down projections that
    `refit_within` left in ``folder``; one layer's are in memory at a time."""

    @lru_cache(maxsize=1)
    def read(i: int) -> Tensor:
        stored = load_file(folder / f"{i}.safetensors")["down_proj"]
        return source.layers[i].layer.channel_major("down_proj", stored)[0]

    order = {
        i: torch.arange(o.shape[1]).expand_as(o) if ranked else o.long()
        for i, o in plan.order.items()
    }
    return down_replaced(source, order, read)
