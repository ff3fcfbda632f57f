"""Raw scores of methods, as they come from their formulas: no order, no plan, no checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from flexmoe.checkpoint import meta_model
from flexmoe.config import SAMPLES
from flexmoe.data import (
    calibration_windows,
    check_seed,
    check_tokens,
    load_tokenizer,
    pick_batch_size,
    pick_seq_len,
)
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.family import load_stock, pick_device
from flexmoe.files import refuse_existing, write_whole
from flexmoe.headers import resolve
from flexmoe.methods import Text, find_method, score_model
from flexmoe.observe import observe
from flexmoe.progress import Track, silent
from flexmoe.reference import add_reference, check_reference


def score(
    model: str | Path,
    methods: Sequence[str],
    out: str | Path,
    *,
    data: str | None = None,
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    reference: str | Path | None = None,
    track: Track = silent,
) -> dict[str, dict[int, Tensor]]:
    """Scores of ``methods``, all from the same pass over calibration text, by method and layer.

    Written to the file ``out`` as float64 tensors ``layers.{i}.{method}`` [E, I] or [E], higher =
    keep, with what they are of in the file's metadata. The text is as in `compress`.
    """
    chosen = [find_method(name, anew=True) for name in dict.fromkeys(methods)]
    check_reference(chosen, reference)
    check_seed(seed)
    asked = {"data": data, "samples": samples, "seq_len": seq_len, "batch_size": batch_size}
    given = [name for name, value in asked.items() if value is not None]
    needs_data = any(method.needs_data for method in chosen)
    if given and not needs_data:
        raise FlexmoeError(
            f"{', '.join(given)} without effect: {', '.join(methods)} looks at the weights only"
        )
    out = Path(out).expanduser()
    if out.is_dir():
        raise FlexmoeError(f"'{out}' is a folder: scores are one file, such as {out}.safetensors")
    refuse_existing(out)
    source = resolve(model)
    config = meta_model(source).config
    ids, about = torch.zeros(1, 2, dtype=torch.long), {"data": "", "data_sha256": ""}
    if needs_data:
        windows = calibration_windows(
            "tiny" if data is None else data,
            load_tokenizer(source, config),
            samples=SAMPLES if samples is None else samples,
            seq_len=pick_seq_len(seq_len, config),
            seed=seed,
        )
        ids = check_tokens(windows.ids, config)
        about = {"data": windows.spec, "data_sha256": windows.sha256}
    dtype = torch.float32 if pick_device(device).type == "cpu" else "auto"
    network = load_stock(source, device=device, dtype=dtype)
    layers = expert_layers(network)
    needs = [name for method in chosen for name in method.needs]
    size = pick_batch_size(batch_size, ids.shape[1])
    statistics = observe(network, ids, needs, batch_size=size, seed=seed, track=track)
    if reference is not None:
        add_reference(statistics, layers, reference)
    text = Text(ids, size, seed, track)
    found = {method.name: score_model(method, network, statistics, text) for method in chosen}
    about |= {"model": str(model), "seed": str(seed), "samples": str(len(ids) if needs_data else 0)}
    units = json.dumps({method.name: method.unit for method in chosen})
    _write(found, about | {"units": units}, out)
    return found


def _write(found: dict[str, dict[int, Tensor]], about: dict[str, str], out: Path) -> None:
    tensors = {
        f"layers.{i}.{name}": score.contiguous()
        for name, scores in found.items()
        for i, score in scores.items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, save(tensors, about))
