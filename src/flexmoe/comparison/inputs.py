"""What a comparison measures and on what: settings, text, pairs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from flexmoe.comparison.results import Row
from flexmoe.config import CompressConfig
from flexmoe.data import (
    check_tokens,
    evaluation_windows,
    load_tokenizer,
    pick_batch_size,
    pick_seq_len,
)
from flexmoe.errors import FlexmoeError
from flexmoe.evaluation.inputs import describe_files, describe_pairs
from flexmoe.evaluation.losses import loss_rows, window_losses
from flexmoe.evaluation.members import Members
from flexmoe.evaluation.pairs import Encoded, Pair, encode, pair_rows, read_pairs, right_pairs
from flexmoe.family import pick_device
from flexmoe.prepare import Prepared
from flexmoe.progress import Track


@dataclass(frozen=True)
class CompareConfig:
    """What to compare on what. ``methods``: see `entries.parse`, or 'all'. ``data``, ``samples``,
    ``seq_len``, ``batch_size``, ``seed`` and ``reference`` as in `compress`; ``evaluate`` the
    held-out text and ``eval_samples`` windows a file of it (None: all); ``pairs`` a file of minimal
    pairs, of each paradigm the first ``pairs_per_paradigm``."""

    methods: tuple[str, ...]
    pruned: tuple[float, ...]
    data: str = "tiny"
    samples: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    evaluate: str = "tiny"
    eval_samples: int | None = None
    pairs: str | Path | None = None
    pairs_per_paradigm: int | None = None
    reference: str | None = None
    seed: int = 0
    device: str = "auto"

    @property
    def common(self) -> CompressConfig:
        """What all entries share as settings of `compress`, of the default method."""
        return CompressConfig(
            data=self.data,
            samples=self.samples,
            seq_len=self.seq_len,
            pruned=self.pruned,
            reference=self.reference,
            batch_size=self.batch_size,
            seed=self.seed,
            device=self.device,
        )


@dataclass(frozen=True)
class Held:
    """What every plan is measured on."""

    windows: dict[str, Tensor]
    pairs: list[Pair]
    encoded: Encoded | None
    batch_size: int
    track: Track

    def rows(self, members: Members) -> dict[Any, Row]:
        """Losses of ``members`` with intervals, by member, of each window too; and pairs. The one
        at 0 is the base."""
        losses = window_losses(
            members, self.windows, 0.0, batch_size=self.batch_size, track=self.track
        )
        found: dict[Any, Row] = dict(loss_rows(losses, 0.0))
        for key, by_file in losses.items():
            found[key]["windows"] = {
                name: [round(value, 6) for value in window_NM[:, 0].tolist()]
                for name, window_NM in by_file.items()
            }
        if self.encoded is not None:
            step = self.batch_size * next(iter(self.windows.values())).shape[1]
            right = right_pairs(members, self.encoded, tokens_per_step=step, track=self.track)
            for key, row in pair_rows(self.pairs, right).items():
                found[key]["pairs"] = row
        return found


def read_held(source: Path, meta: PreTrainedModel, config: CompareConfig, track: Track) -> Held:
    """The held-out text and pairs, as tokens of the model in ``source``."""
    if config.pairs_per_paradigm is not None and config.pairs is None:
        raise FlexmoeError("--pairs-per-paradigm has no effect without --pairs FILE")
    tokenizer = load_tokenizer(source, meta.config)
    length = pick_seq_len(config.seq_len, meta.config)
    windows = evaluation_windows(
        config.evaluate, tokenizer, samples=config.eval_samples, seq_len=length
    )
    for ids in windows.values():
        check_tokens(ids, meta.config)
    pairs = [] if config.pairs is None else read_pairs(config.pairs, config.pairs_per_paradigm)
    encoded = encode(pairs, tokenizer, meta.config) if pairs else None
    return Held(windows, pairs, encoded, pick_batch_size(config.batch_size, length), track)


def settings_of(
    model: str | Path, ready: Prepared, held: Held, config: CompareConfig
) -> dict[str, Any]:
    """What every line of the file rests on."""
    windows = ready.windows
    assert windows is not None
    per_paradigm = config.pairs_per_paradigm
    pairs = None if config.pairs is None else describe_pairs(config.pairs, per_paradigm)
    return {
        "model": Path(model).name,
        "weights_sha256": ready.weights_sha256,
        "reference": None if config.reference is None else Path(config.reference).name,
        "seed": config.seed,
        "batch_size": held.batch_size,
        "device": pick_device(config.device).type,
        "calibration": {
            "windows": len(windows.ids),
            "seq_len": windows.ids.shape[1],
            "sha256": windows.sha256,
        },
        "evaluation": describe_files(held.windows),
        "pairs": pairs,
    }
