"""Shared by the tests of files: random plans, the masking oracle, checkpoints on disk."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from flexmoe.checkpoint import Checkpoint
from flexmoe.cli import main
from flexmoe.evaluation.records import Curve, OfWeights, Point, TextFile
from flexmoe.experts import expert_layers, experts_function
from flexmoe.plan import LayerRecord, Plan, Recipe

BUDGETS = (0.0, 0.2, 0.4, 0.6)
# The same float32 products summed in another order or grouping, two layers deep.
LOGIT_TOLERANCE = 1e-5


def random_plan(
    model: PreTrainedModel,
    source: Path,
    budgets: tuple[float, ...] = BUDGETS,
    seed: int = 0,
    quantum: int = 2,
) -> Plan:
    """A valid plan with random orders and random nested widths. In the first layer expert 0 is
    the first to go, to width 0, and expert 1 the last."""
    generator = torch.Generator().manual_seed(seed)
    layers, order = {}, {}
    blocks: list[tuple[float, int, int]] = []  # when to go, layer, expert
    for layer in expert_layers(model):
        i, shape = layer.index, layer.shape
        layers[i] = LayerRecord(**vars(shape), experts_per_token=2)
        ranks = [torch.randperm(shape.channels, generator=generator) for _ in range(shape.experts)]
        order[i] = torch.stack(ranks).int()
        assert shape.channels % quantum == 0
        for e in range(shape.experts):
            when = torch.rand(shape.channels // quantum, generator=generator).tolist()
            special = {0: -1.0, 1: 2.0}.get(e) if not blocks or blocks[0][1] == i else None
            blocks += [(t if special is None else special, i, e) for t in when]
    blocks.sort()
    total = sum(record.shape.parameters for record in layers.values())
    width = {i: torch.empty(0, record.experts, dtype=torch.int32) for i, record in layers.items()}
    now = {i: torch.full((r.experts,), r.channels, dtype=torch.int32) for i, r in layers.items()}
    removed, at = 0, 0
    for share in budgets:
        while removed < share * total - 1e-6:
            _, i, e = blocks[at]
            now[i][e] -= quantum
            removed, at = removed + quantum * layers[i].channel_parameters, at + 1
        width = {i: torch.cat([width[i], now[i][None]]) for i in layers}
    return Plan(
        layers=layers,
        order=order,
        width=width,
        budgets=budgets,
        quantum=quantum,
        recipe=Recipe(
            base_model=str(source),
            model_type=model.config.model_type,
            method="random",
            allocate="random",
            data="none",
            data_sha256="0" * 64,
            samples=1,
            seq_len=8,
            seed=seed,
        ),
        bytes_full=Checkpoint(source).bytes,
        bytes_per_parameter=model.dtype.itemsize,
    )


def made_curve(plan: Plan, of: OfWeights, files: tuple[str, ...] = ("a", "b")) -> Curve:
    """A curve with made-up losses, no two figures alike."""
    points = []
    for share in plan.budgets:
        losses = {name: 2.0417 + share * (1.1731 + 0.3179 * n) for n, name in enumerate(files)}
        nll = sum(losses.values()) / len(losses)
        increase = nll - 2.0417
        spread = (increase * 0.9137, increase * 1.0873) if share else (0.0, 0.0)
        points.append(
            Point(
                **plan.member(share).model_dump(),
                nll=nll,
                files=losses,
                increase=increase,
                increase_interval=spread,
                kept=math.exp(-increase),
                kept_interval=(math.exp(-spread[1]), math.exp(-spread[0])),
                pairs=None,
            )
        )
    return Curve(
        format=1,
        date="2026-01-02T03:04:05+00:00",
        of=of,
        data=",".join(files),
        files={name: TextFile(windows=3, seq_len=17, sha256="0" * 64) for name in files},
        pairs=None,
        hardware="an abacus",
        dtype="float32",
        versions={"torch": "0.0"},
        budgets=points,
    )


def logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(input_ids=ids).logits


def masked_logits(
    model: PreTrainedModel,
    widths: Plan | dict[int, Tensor],
    pruned: float,
    ids: Tensor,
    order: dict[int, Tensor] | None = None,
) -> Tensor:
    """Logits of the unranked model with the pruned channels' activations set to zero."""
    if isinstance(widths, Plan):
        widths, order = widths.widths(pruned), widths.order
    for layer in expert_layers(model):
        kept_EI = torch.arange(layer.I) < widths[layer.index][:, None]
        mask_EI = torch.zeros(layer.E, layer.I)
        mask_EI.scatter_(1, order[layer.index].long(), kept_EI.float())
        layer.module.flexmoe_mask_EI = mask_EI
    with experts_function(model, "flexmoe_mask"):
        return logits(model, ids)


def masked_text(
    model: PreTrainedModel, tokenizer: Any, plan: Plan, pruned: float, prompt: str, new: int
) -> str:
    """The likeliest ``new`` tokens after a prompt, or fewer, by `masked_logits`."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    for _ in range(new):
        best = masked_logits(model, plan, pruned, ids)[0, -1].argmax()
        ids = torch.cat([ids, best[None, None]], 1)
        if best == model.generation_config.eos_token_id:
            break
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


def command(*words: object) -> int:
    """The exit code of ``flexmoe`` with these words."""
    with mock.patch.object(sys, "argv", ["flexmoe", *map(str, words)]):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    raise AssertionError("main ends with an exit code")


def ids_of(model: PreTrainedModel, seed: int = 0) -> Tensor:
    """Two random sequences of ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 60, (2, 12), generator=generator)


def same_model(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    """Whether two loaded models have the same class and, bit for bit, the same weights. Their
    logits may still differ by rounding: files lie at other addresses, and vector code sums an
    unaligned row in another order."""
    mine, theirs = a.state_dict(), b.state_dict()
    return (
        type(a) is type(b)
        and mine.keys() == theirs.keys()
        and all(torch.equal(mine[name], theirs[name]) for name in mine)
    )


def difference(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest logit."""
    return float((a - b).abs().max() / b.abs().max())


def load(path: Path, model: PreTrainedModel) -> PreTrainedModel:
    """What transformers loads from ``path`` under the class of ``model``, in float32."""
    return type(model).from_pretrained(path, dtype=torch.float32).eval()


def tensors(path: Path) -> dict[str, Tensor]:
    """All weights in a checkpoint's folder."""
    found: dict[str, Tensor] = {}
    for file in path.glob("*.safetensors"):
        if file.name != "flexmoe.safetensors":
            found |= load_file(file)
    return found


def expert_bytes(model):
    """Bytes of storage behind the parameters of all experts."""
    modules = [m for name, m in model.named_modules() if name.endswith("experts")]
    return sum(p.untyped_storage().nbytes() for m in modules for p in m.parameters(recurse=False))
