"""What a job will need: memory, time and disk, before it starts.

Memory is what the process takes at most beyond Python and its libraries: the weights, what stays
beside them, and the activations of the largest step, which a dry run counts (`dryrun`). Time is
the operations of that dry run over the rate of a matrix product of the experts' own shape, plus
the bytes it writes over the rate of a copy, both measured here for a moment: an estimate, no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from transformers import PreTrainedModel

from flexmoe.actions import ActionConfig
from flexmoe.checkpoint import DTYPES, Checkpoint, meta_model
from flexmoe.config import SAMPLES, CompressConfig
from flexmoe.data import pick_batch_size, pick_seq_len
from flexmoe.distil import STRATA, parts_of_step
from flexmoe.doctor.dryrun import DryRun
from flexmoe.doctor.found import Need
from flexmoe.doctor.machine import Rates, measure_rates
from flexmoe.doctor.meter import Cost
from flexmoe.doctor.sizes import Sizes
from flexmoe.experts import expert_layers
from flexmoe.family import pick_device
from flexmoe.learn import CHECKED, MIXES, LearnConfig
from flexmoe.methods import Method, check_shape, find_method, score_layer
from flexmoe.methods.diep import EPOCHS, WINDOWS
from flexmoe.rco import RcoConfig
from flexmoe.recover import trained_parameters
from flexmoe.recover_config import RANK, TOKENS, RecoverConfig
from flexmoe.reference import ROUTER
from flexmoe.statistics import LayerStatistics, find_statistics
from flexmoe.trace import TracedLayer, trace


@dataclass
class Estimator:
    """The needs of jobs on one checkpoint and device."""

    checkpoint: Checkpoint
    traced: Mapping[int, TracedLayer]
    device: torch.device
    _rates: dict[torch.dtype, Rates] = field(default_factory=dict)
    _dry: dict[torch.dtype, DryRun] = field(default_factory=dict)
    _compared: dict[tuple[torch.dtype, int, int], Cost] = field(default_factory=dict)
    _distilled: dict[tuple, Cost] = field(default_factory=dict)

    @classmethod
    def open(cls, path: str | Path, device: str = "auto") -> Estimator:
        """Of the checkpoint or family in a folder."""
        checkpoint = Checkpoint(path)
        return cls(checkpoint, trace(checkpoint, meta_model(path)), pick_device(device))

    @cached_property
    def model(self) -> PreTrainedModel:
        return meta_model(self.checkpoint.path)

    @cached_property
    def top_k(self) -> int | None:
        """Experts a token is sent to; None where the forward pass looks at values. A `RuntimeError`
        if the model cannot run at all."""
        dry = self.dry(self.dtype)
        try:
            dry.forward(1, 2)
        except (DataDependentOutputException, DynamicOutputShapeException):
            pass
        return dry.top_k

    def try_method(self, method: Method) -> None:
        """`FlexmoeError` if a method fails, or its scores have the wrong shape, for statistics of
        which only shapes are known. What depends on values is seen later."""
        if method.learns:
            return
        dry = self.dry(self.dtype)
        layer = dry.layers[0]
        with dry.mode:
            wanted = find_statistics(["count_E", *method.needs])
            values = {s.name: torch.ones_like(s.zeros(layer)) for s in wanted}
            if method.reference:
                values[ROUTER] = torch.ones(layer.E, layer.H, dtype=torch.float64)
            shape = score_layer(method, layer, LayerStatistics(values, 1, 1, 1)).shape
        check_shape(method, layer, shape)

    @property
    def stored(self) -> torch.dtype:
        """The experts' dtype in the checkpoint."""
        piece = next(iter(self.traced.values())).stored[0]
        return DTYPES[self.checkpoint.tensors[piece.name].dtype]

    @property
    def dtype(self) -> torch.dtype:
        """What `compress` computes in here."""
        return torch.float32 if self.device.type == "cpu" else self.stored

    def dry(self, dtype: torch.dtype) -> DryRun:
        """The model for dry runs, made once a dtype."""
        if dtype not in self._dry:
            model = meta_model(self.checkpoint.path)
            self._dry[dtype] = DryRun(model, dtype, heap=self.device.type == "cpu")
        return self._dry[dtype]

    @cached_property
    def sizes(self) -> Sizes:
        total = sum(p.numel() for p in self.model.parameters())
        return Sizes.of(self.checkpoint.tensors, self.traced, total)

    def seconds(self, cost: Cost, dtype: torch.dtype, tokens: int) -> float:
        """Time of a cost on this device, ``tokens`` of them at a time."""
        rates = self.rates(dtype, tokens)
        return cost.operations / rates.operations + cost.moved / rates.bytes

    def rates(self, dtype: torch.dtype, tokens: int) -> Rates:
        """The rates for products of the size that ``tokens`` make, measured once a dtype."""
        if dtype not in self._rates:
            E = expert_layers(self.model)[0].E
            rows = min(4096, tokens * (self.top_k or 1) // E)
            self._rates[dtype] = measure_rates(self.device, dtype, rows, self.model)
        return self._rates[dtype]

    @property
    def files(self) -> float:
        """Seconds to read, write and compare all tensors, if the disk is no slower than memory."""
        return 4 * self.checkpoint.bytes / self.rates(self.dtype, 4096).bytes

    # --- the jobs -----------------------------------------------------------------------------

    def compress(self, config: CompressConfig) -> Need:
        """`flexmoe.pipeline.compress` of this checkpoint."""
        method, dtype = find_method(config.method), self.dtype
        length = pick_seq_len(config.seq_len, self.model.config)
        size = pick_batch_size(config.batch_size, length)
        wanted = find_statistics(method.needs)
        learned = config.allocator == "learned"
        masks = learned or (config.allocator == "rco" and method.unit == "channel")
        need = self.sizes.compress(dtype.itemsize, len(wanted), masks, learned)
        if not config.needs_data:
            return self._need(need, Cost(), dtype, 1)
        cost = self._try(lambda: self._compress(config, size, length, dtype))
        return self._need(need, cost, dtype, size * length)

    def _compress(self, config: CompressConfig, size: int, length: int, dtype: torch.dtype) -> Cost:
        dry, samples = self.dry(dtype), config.samples or SAMPLES
        method = find_method(config.method)
        cost = dry.observe(size, length, find_statistics(method.needs))
        cost = cost.times(math.ceil(samples / size))
        if method.learns:  # as `diep`: a method of your own may take more steps, or less
            part = min(size, WINDOWS)
            parts = EPOCHS * math.ceil(samples / WINDOWS) * WINDOWS / part
            cost = cost.then(dry.scale(part, length).times(parts))
        if config.allocator in ("rco", "actions"):
            return cost.then(self._masks(config, size, length))
        if config.allocator != "learned":
            return cost
        steps = config.learn.steps if config.learn else LearnConfig().steps
        micro = min(config.micro_batch or size, math.ceil(size / 2))
        half = dry.learn(micro, length, LearnConfig().draws, config.checkpointing)
        cost = cost.then(half.times(steps * size / micro))
        micro = config.micro_batch or size
        members = 4 * size / micro * len(MIXES) * len(CHECKED)
        return cost.then(self._compare(dtype, micro, length).times(members / 2))

    def _masks(self, config: CompressConfig, size: int, length: int) -> Cost:
        """Of the allocators `rco` and `actions`: every mask has windows of its own."""
        dry = self.dry(self.dtype)
        if config.allocator == "actions":
            actions = config.learn if isinstance(config.learn, ActionConfig) else ActionConfig()
            return dry.learn(size, length, 1, False).times(actions.steps)
        rco = config.learn if isinstance(config.learn, RcoConfig) else RcoConfig()
        budgets = len(set(config.pruned))
        steps = budgets * math.ceil(rco.steps / budgets)
        return dry.learn(rco.windows, length, 1, False).times(steps * rco.draws)

    def recover(self, config: RecoverConfig, free: int) -> Need:
        """`flexmoe.recover.recover` of a family of this checkpoint; ``free`` bytes of memory."""
        dtype = torch.float32
        length = pick_seq_len(config.seq_len, self.model.config)
        size = pick_batch_size(config.batch_size, length)
        tokens = config.tokens or TOKENS[config.mode]
        steps = max(1, tokens // (size * length))
        layers = expert_layers(self.model)
        if config.mode == "closed-form":
            need = self.sizes.closed_form(free)
            _, passes = self.sizes.moments(free)
            cost = self._try(lambda: self.dry(dtype).forward(size, length).times(steps * passes))
            work = sum(layer.E * layer.I**2 * (layer.I / 3 + 4 * layer.H) for layer in layers)
            work += sum(2 * layer.I**2 * (self.top_k or 1) * tokens for layer in layers)
            cost = cost and Cost(cost.peak, cost.operations + work, cost.moved)
            return self._need(need, cost, dtype, size * length)
        if config.mode == "lora":
            trained = self.sizes.adapters(config.rank or RANK)
        else:
            parameters = trained_parameters(self.model, config.mode)
            trained = sum(p.numel() for p in parameters.values())
        need = self.sizes.trained(config.mode, trained)
        micro = config.micro_batch or size
        cost = self._try(lambda: self._distil(config, size, micro, length, steps))
        return self._need(need, cost, dtype, micro * length)

    def _distil(
        self, config: RecoverConfig, size: int, micro: int, length: int, steps: int
    ) -> Cost:
        dry = self.dry(torch.float32)
        mode = "full" if config.mode == "lora" else config.mode
        trained = list(trained_parameters(dry.model, mode).values())
        scheme = config.picked_scheme
        parts = parts_of_step(scheme, 0.0, 1.0, micro, 0, [1.0] * STRATA, 0)
        rows = [len(part.rows) for part in parts]
        key = (mode, micro, *rows, length, config.checkpointing)
        if key not in self._distilled:  # of two modes the step is the same
            step = dry.distil(micro, rows, length, trained, config.checkpointing)
            self._distilled[key] = step
        step = self._distilled[key]
        cost = step.times(steps * size / micro)
        if scheme == "sp":
            return cost
        probe = self._compare(torch.float32, micro, length)
        if scheme == "cp":  # all parts once more without gradients, after one teacher, every step
            return probe.times((1 + len(parts)) / 2 * steps * size / micro).then(cost)
        return probe.times((STRATA - 1) * size / micro).then(cost)

    def _try(self, run: Callable[[], Cost]) -> Cost | None:
        """The cost of a dry run, or None for models that cannot be tried on shapes alone."""
        try:
            return run()
        except RuntimeError:  # that it does run on values, `top_k` has shown
            return None

    def _compare(self, dtype: torch.dtype, windows: int, length: int) -> Cost:
        """`DryRun.compare`, which several jobs need, tried once."""
        key = (dtype, windows, length)
        if key not in self._compared:
            self._compared[key] = self.dry(dtype).compare(windows, length)
        return self._compared[key]

    def _need(self, need: Need, cost: Cost | None, dtype: torch.dtype, tokens: int) -> Need:
        activations = None if cost is None else cost.peak
        need = self.sizes.held(need, dtype.itemsize, self.device.type == "cpu", activations)
        seconds = None if cost is None else self.seconds(cost, dtype, tokens) + self.files
        return replace(need, seconds=seconds)

    def export(self, layout: str, size: int) -> Need:
        """An export of ``size`` bytes."""
        return replace(self.sizes.export(layout, size), seconds=self.files)
