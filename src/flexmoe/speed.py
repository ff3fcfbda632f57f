"""Speed of a whole model at every budget, beside the unpruned one as transformers runs it.

Each member answers the same batches in turn, several rounds of it, and medians count, so that what
else the machine does falls on all alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flexmoe.checkpoint import meta_model
from flexmoe.elastic import release
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.compared import exported_share
from flexmoe.evaluation.curve import hardware, versions
from flexmoe.experts import expert_layers
from flexmoe.family import find_folder, find_weights, load, set_budget
from flexmoe.headers import EXPORT_NAME
from flexmoe.plan import JSON_NAME

STOCK = ("eager", "grouped_mm")  # what transformers runs experts with


@dataclass(frozen=True)
class SpeedConfig:
    """``batches`` of sequences with ``prompt`` tokens each, ``new`` tokens after them; ``repeats``
    rounds after one that warms up; ``pruned`` budgets (None: all of the family)."""

    batches: tuple[int, ...] = (1, 8, 64)
    prompt: int = 128
    new: int = 16
    repeats: int = 5
    pruned: tuple[float, ...] | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        counts = (*self.batches, self.prompt, self.new, self.repeats)
        if not self.batches or min(counts) < 1:
            raise FlexmoeError("batches, prompt, new and repeats must be whole numbers from 1 on")


@dataclass(frozen=True)
class Runner:
    """Something to measure: ``engine``, its ``pruned`` share, how to make the model be it."""

    engine: str
    pruned: float
    model: PreTrainedModel
    be: Callable[[], Any]


def measure(
    path: str,
    config: SpeedConfig,
    against: str | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Rows of every engine and batch: ``ttft_s`` (seconds for the prompt and the first token),
    ``tpot_s`` (for each further one), tokens per second of both, and ``weights``, bytes of all
    parameters, of a family with what lies beyond the budget released.

    A family is compared with itself at budget 0 under transformers' own functions, other models
    with the model ``against`` where it is given.
    """
    dtype = config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    folder = find_folder(path)
    family = (folder / JSON_NAME).is_file()
    if config.pruned is not None and not family:
        raise FlexmoeError("only a family has budgets: leave --pruned out")
    if against is not None:
        if family:
            raise FlexmoeError("a family is compared with itself at budget 0: leave --against out")
        expert_layers(meta_model(find_weights(against)))  # refuse what is none before the slow part
    _check_room(config, meta_model(find_weights(path)).config)
    opened = load(path, device=config.device, dtype=dtype)
    runners = _family(opened, config) if family else _single(opened, folder)
    if against is not None:
        base = load(against, device=config.device, dtype=dtype)
        runners = [_stock(base, name) for name in STOCK] + runners
    clock, about = _clock(opened)
    times: dict[tuple[int, int], list[tuple[float, float]]] = {}
    with torch.inference_mode():
        for _ in range(config.repeats + 1):
            for n, runner in enumerate(runners):
                runner.be()
                for batch in config.batches:
                    progress(f"{runner.engine}, batch {batch}")
                    ids = _prompt(runner.model, batch, config.prompt)
                    times.setdefault((n, batch), []).append(
                        _generate(runner.model, ids, config.new, clock)
                    )
    weights = _weights(runners)
    rows = []
    for (n, batch), found in times.items():
        ttft, tpot = (median(part) for part in zip(*found[1:], strict=True))
        rows.append(
            {
                "engine": runners[n].engine,
                "pruned": runners[n].pruned,
                "batch": batch,
                "ttft_s": ttft,
                "tpot_s": tpot,
                "prefill_tokens_per_s": batch * config.prompt / ttft,
                "decode_tokens_per_s": batch / tpot,
                "weights": weights[n],
            }
        )
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware(opened.device),
        "versions": versions(),
        "dtype": str(opened.dtype).removeprefix("torch."),
        "clock": about,
        "prompt": config.prompt,
        "new": config.new,
        "repeats": config.repeats,
        "rows": rows,
    }


def _check_room(config: SpeedConfig, settings: PreTrainedConfig) -> None:
    """`FlexmoeError` for more tokens than the model has positions."""
    context = getattr(settings.get_text_config(), "max_position_embeddings", None)
    if context and config.prompt + config.new > context:
        raise FlexmoeError(
            f"--prompt {config.prompt} and --new {config.new} are more than the model's context of "
            f"{context} tokens: lower one of them"
        )


def _family(model: PreTrainedModel, config: SpeedConfig) -> list[Runner]:
    """Transformers' functions at budget 0, then every budget through the kernels."""

    def be(share: float, function: str | None) -> None:
        set_budget(model, share)
        if function:
            model.set_experts_implementation(function)

    set_budget(model, 0.0)
    shares = model.flexmoe_plan.budgets if config.pruned is None else config.pruned
    for share in shares:
        model.flexmoe_plan.widths(share)  # refuse a share out of reach before the slow part
    stock = [Runner(f"transformers {name}", 0.0, model, partial(be, 0.0, name)) for name in STOCK]
    # at 0 too: what a server runs, whose requests have budgets of their own
    own = [
        Runner("flexmoe", share, model, partial(be, share, None if share else "flexmoe"))
        for share in sorted(shares)
    ]
    return stock + own


def _single(model: PreTrainedModel, folder: Path) -> list[Runner]:
    """A ragged export, or the functions of transformers for what is stock."""
    if table := getattr(model.config, "quantization_config", None):
        return [Runner("flexmoe, ragged export", table.pruned, model, lambda: None)]
    what = ", export" if (folder / EXPORT_NAME).is_file() else ""
    return [_stock(model, name, what, exported_share(folder)) for name in STOCK]


def _stock(model: PreTrainedModel, name: str, what: str = "", pruned: float = 0.0) -> Runner:
    expert_layers(model)  # refuse what has none
    return Runner(
        f"transformers {name}{what}", pruned, model, lambda: model.set_experts_implementation(name)
    )


def _prompt(model: PreTrainedModel, batch: int, tokens: int) -> Tensor:
    random = torch.Generator().manual_seed(0)
    size = model.get_input_embeddings().weight.shape[0]
    return torch.randint(size, (batch, tokens), generator=random).to(model.device)


def _generate(
    model: PreTrainedModel, ids: Tensor, new: int, clock: Callable[[], float]
) -> tuple[float, float]:
    """Seconds to the first token, and the median of those for each further one."""
    start = clock()
    out = model(ids, use_cache=True, logits_to_keep=1)
    token = out.logits[:, -1:].argmax(-1)
    times, last = [], clock()
    first = last - start
    for _ in range(new):
        out = model(token, past_key_values=out.past_key_values, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        now = clock()
        times.append(now - last)
        last = now
    return first, median(times)


def _clock(model: PreTrainedModel) -> tuple[Callable[[], float], str]:
    if model.device.type == "cuda":

        def seconds() -> float:
            torch.cuda.synchronize(model.device)
            return time.perf_counter()

        return seconds, "wall clock, GPU synchronised"
    if torch.get_num_threads() == 1:
        return time.thread_time, "CPU time of one thread"
    return time.perf_counter, f"wall clock, {torch.get_num_threads()} threads"


def _weights(runners: Sequence[Runner]) -> list[int]:
    """Bytes of all parameters; of a family rich to poor, each with what is beyond it released."""
    sizes = []
    for runner in runners:
        if getattr(runner.model, "flexmoe_source", None) is not None:
            set_budget(runner.model, runner.pruned)
            release(runner.model)
        found = {p.data_ptr(): p.untyped_storage().nbytes() for p in runner.model.parameters()}
        sizes.append(sum(found.values()))
    return sizes
