"""Make the pattern of a task: score the model's experts on the task's text, and learn how to know
such text again."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from flexmoe.config import SAMPLES, CompressConfig
from flexmoe.data import Windows
from flexmoe.errors import FlexmoeError
from flexmoe.family import pick_device
from flexmoe.methods import find_method
from flexmoe.pipeline import rank
from flexmoe.premoe.pattern import Pattern
from flexmoe.premoe.signature import front, mean_signature, measure_reach
from flexmoe.premoe.store import FOLDER, Store
from flexmoe.prepare import prepare
from flexmoe.progress import Track, silent
from flexmoe.resume import Work

HELD_OUT = 4  # windows are scored for each one that is held out


def profile(
    model: str | Path,
    task: str,
    data: str,
    *,
    store: str | Path = FOLDER,
    method: str = "peu",
    samples: int | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    device: str = "auto",
    memory: int | None = None,
    track: Track = silent,
) -> Pattern:
    """Score the experts of ``model`` on the text ``data`` of a task and add the pattern to
    ``store``.

    ``method`` is any that scores whole experts from text: PreMoe's ``peu`` (third version) or
    ``tcess`` (first), or another one's. ``samples`` windows are scored, as in `compress`; a quarter
    as many again are held out to measure how far text of the task lies from its signature. With
    ``memory`` (bytes) the model is read layer by layer. A run that was killed goes on from its last
    state when it is started again with the same settings.
    """
    chosen = find_method(method)
    if chosen.unit != "expert":
        raise FlexmoeError(
            f"method '{method}' scores channels, not whole experts: use peu or tcess"
        )
    if not chosen.needs_data:
        raise FlexmoeError(
            f"method '{method}' does not look at text, so all tasks are alike: use peu or tcess"
        )
    place = Store(store)
    place.check_name(task)
    scored = SAMPLES if samples is None else samples
    if scored < 1:
        raise FlexmoeError(f"samples must be at least 1, found {scored}")
    config = CompressConfig(
        data=data,
        samples=scored + max(1, scored // HELD_OUT),
        seq_len=seq_len,
        method=method,
        batch_size=batch_size,
        seed=seed,
        device=device,
        memory=memory,
    )
    work = Work(place.path / task, {"model": str(model), **dataclasses.asdict(config)})
    if work.begun and task in place.tasks:  # killed when all was done
        work.clear()
        return place.load(task)
    place.check_new(task)
    ready = prepare(model, config)
    place.check_weights(ready.weights_sha256, model)
    assert ready.windows is not None
    windows, held_out = _parts(ready.windows, scored)
    with work.on(**ready.inputs):
        ranked = rank(replace(ready, windows=windows), track, work.stage("observe"))
        # ranked has the best experts' channels first: those of an expert score the same, so that
        # their order is the model's own
        score = {i: score_EI[:, 0].clone() for i, score_EI in ranked.score.items()}
        recipe, layers = ranked.recipe, ranked.layers
        del ranked  # the model: what follows needs its first layers only
        step = 1 if memory is not None else ready.batch_size
        with front(ready.source, pick_device(device)) as network:
            signature_E = mean_signature(network, windows.ids, step, track)
            reach, spread = measure_reach(network, windows.ids, held_out, signature_E, step, track)
    pattern = Pattern(
        task=task,
        score=score,
        signature_E=signature_E,
        reach=reach,
        spread=spread,
        recipe=recipe,
        layers=layers,
        bytes_full=ready.bytes_full,
        bytes_per_parameter=ready.bytes_per_parameter,
    )
    with work.writing():
        pattern.save(place.path)
    work.clear()
    return pattern


def _parts(windows: Windows, scored: int) -> tuple[Windows, Tensor]:
    """The first ``scored`` windows, and the tokens of the others: all were shuffled. Where both
    have parts of one document little is betrayed: no window weighs much in a mean over all."""
    first = replace(windows, ids=windows.ids[:scored], source_n=windows.source_n[:scored])
    return first, windows.ids[scored:]
