"""What a pass over calibration text saw, source by source, and its file beside a family.

All statistics are sums, so those of a mixture are the weighted sum of those of its sources: another
mixture needs no other pass.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from flexmoe.data import Windows
from flexmoe.errors import FlexmoeError
from flexmoe.experts import expert_layers
from flexmoe.observe import watched
from flexmoe.progress import Steps, Track, silent
from flexmoe.resume import Saved
from flexmoe.sharding import is_sharded
from flexmoe.statistics import LayerStatistics, Statistics, beside, empty_statistics, passes
from flexmoe.training import processes, share

FILE_NAME = "statistics.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Evidence:
    """Statistics of every source of a pass by its name, channels in the order of the base model;
    ``data_sha256`` of all tokens read."""

    sources: dict[str, Statistics]
    data_sha256: str

    def mixed(self, weight: Mapping[str, float] | None = None) -> Statistics:
        """The statistics of a mixture of the sources.

        By default as they were read. With ``weight`` only the sources named there, each scaled so
        that tokens are shared in proportion to the weights and are as many together as before.
        Maxima are not scaled.
        """
        if weight is None:
            factor = dict.fromkeys(self.sources, 1.0)
        else:
            tokens = {name: _tokens(self.sources[name]) for name in weight}
            each = sum(tokens.values()) / sum(weight.values())
            factor = {name: weight[name] * each / tokens[name] for name in weight}
        found: Statistics = {}
        for name, times in factor.items():
            for i, stats in self.sources[name].items():
                if i in found:
                    found[i].merge(stats.scaled(times))
                else:
                    found[i] = stats.scaled(times)
        return found

    def only(self, names: Iterable[str]) -> Evidence:
        """The same with these sources alone."""
        return Evidence({name: self.sources[name] for name in names}, self.data_sha256)

    def having(self, names: Iterable[str]) -> Evidence:
        """The same with these statistics alone."""
        chosen = set(names)
        sources = {
            source: {
                i: replace(s, values={n: v for n, v in s.values.items() if n in chosen})
                for i, s in statistics.items()
            }
            for source, statistics in self.sources.items()
        }
        return Evidence(sources, self.data_sha256)

    def beside(self, later: Evidence) -> Evidence:
        """This and what a later pass over the same windows saw."""
        sources = {
            source: beside(self.sources.get(source, {}), statistics)
            for source, statistics in later.sources.items()
        }
        return Evidence(sources, self.data_sha256)

    def counts(self) -> dict[str, dict[int, Tensor]]:
        """Tokens that each expert saw, [E] by source and layer."""
        return {
            name: {i: stats["count_E"] for i, stats in statistics.items()}
            for name, statistics in self.sources.items()
        }

    # --- as tensors and files ------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """All sums (float64) as ``{source}.{layer}.{statistic}``, sources by number, and what each
        source saw: ``{source}.seen`` int64 [tokens, batches, seed]."""
        found = {}
        for s, statistics in enumerate(self.sources.values()):
            first = next(iter(statistics.values()))
            found[f"{s}.seen"] = torch.tensor([first.tokens, first.batches, first.seed])
            for i, stats in statistics.items():
                found |= {f"{s}.{i}.{name}": value.cpu() for name, value in stats.values.items()}
        return found

    @classmethod
    def from_tensors(
        cls, names: list[str], tensors: Mapping[str, Tensor], data_sha256: str
    ) -> Evidence:
        """The reverse of `tensors` for sources of these names."""
        sources: dict[str, Statistics] = {name: {} for name in names}
        for key, value in tensors.items():
            s, _, rest = key.partition(".")
            i, _, name = rest.partition(".")
            if name:
                statistics = sources[names[int(s)]]
                tokens, batches, seed = tensors[f"{s}.seen"].tolist()
                stats = statistics.setdefault(
                    int(i), LayerStatistics({}, int(tokens), int(batches), int(seed))
                )
                stats.values[name] = value
        ordered = {name: dict(sorted(found.items())) for name, found in sources.items()}
        return cls(ordered, data_sha256)

    def save(self, folder: Path) -> None:
        """Write ``statistics.safetensors``: a channel takes 8 bytes a statistic and source."""
        tensors = self.tensors()
        about: dict[str, Any] = {
            "format": FORMAT,
            "data_sha256": self.data_sha256,
            "sources": list(self.sources),
        }
        about["sha256"] = _digest(about, tensors)
        (folder / FILE_NAME).write_bytes(save(tensors, {"flexmoe": json.dumps(about)}))

    @classmethod
    def load(cls, folder: str | Path, data_sha256: str) -> Evidence:
        """Read what `compress` kept in a family, which is made from data of this sha256."""
        path = Path(folder) / FILE_NAME
        if not path.is_file():
            raise FlexmoeError(
                f"'{folder}' keeps no statistics ({FILE_NAME}): they are in the folder that "
                "compress made, if it reads text and is not --sequential"
            )
        try:
            with safe_open(path, framework="pt") as file:
                about = json.loads(file.metadata()["flexmoe"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            wanted = about.pop("sha256")
            sound = about["format"] == FORMAT and _digest(about, tensors) == wanted
        except (SafetensorError, ValueError, LookupError, TypeError) as error:
            raise FlexmoeError(f"{path} is damaged ({error}): compress again") from None
        if not sound:
            raise FlexmoeError(f"{path} is damaged: its sha256 does not fit, compress again")
        if about["data_sha256"] != data_sha256:
            raise FlexmoeError(f"{path} is of other data than the plan beside it: compress again")
        return cls.from_tensors(about["sources"], tensors, data_sha256)


def _tokens(statistics: Statistics) -> int:
    return next(iter(statistics.values())).tokens


def _digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


def gather(
    model: nn.Module,
    windows: Windows,
    names: tuple[str, ...],
    *,
    batch_size: int = 8,
    seed: int = 0,
    saved: Saved | None = None,
    track: Track = silent,
) -> Evidence:
    """One pass over all calibration windows that fills the named statistics, source by source
    (more passes only where a statistic comes after another).

    Several processes look at a part of the batches each, and all get the evidence of the whole
    pass. ``saved`` keeps it when it is complete, and on the way where there is one process.
    """
    rounds, layers = passes(names), expert_layers(model)
    every, world = windows.batches(batch_size), processes()[1]
    batches = share(every)
    sources = list(dict.fromkeys(name for name, _ in every))
    found, part = Evidence({}, windows.sha256), None
    done, begin = 0, 0  # passes, and batches of the next one
    if saved is not None and (state := saved.load()) is not None:
        done, begin = divmod(state[0], len(every))
        kept = Evidence.from_tensors(sources, state[1], windows.sha256)
        found = kept.having(s.name for wanted in rounds[:done] for s in wanted)
        for name, statistics in found.sources.items():  # of a whole pass, not of the one begun
            seen = [ids.numel() for source, ids in every if source == name]
            for stats in statistics.values():
                stats.tokens, stats.batches = sum(seen), len(seen)
        if begin and world == 1:
            part = kept.having(s.name for s in rounds[done])
    tokens = batch_size * windows.ids.shape[1] * world
    for number, wanted in enumerate(rounds[done:], done):
        if part is None:
            empty = {name: empty_statistics(layers, wanted, seed) for name in sources}
            part, begin = Evidence(empty, windows.sha256), 0
        with watched(model, wanted, found.mixed()) as look:
            for at in track(Steps(begin, len(batches), tokens), "observe"):
                source, ids = batches[at]
                into = part.sources[source]
                look(ids, into)
                if at + 1 == len(batches) or batches[at + 1][0] != source:
                    for stats in into.values():  # one source's at a time stand on the device
                        stats.to("cpu")
                last = at + 1 == len(batches)  # is written below
                if saved is not None and world == 1 and not last and saved.due:
                    step = number * len(every) + at + 1
                    saved.save(step, found.beside(part).tensors())
            if is_sharded(model) and len(batches) < len(every[::world]):
                # sharded weights are gathered by all together, so who is out of batches plays along
                look(windows.ids[:1, :2], empty_statistics(layers, wanted))
        found, part = found.beside(_of_all_processes(part)), None
        if saved is not None:
            saved.save((number + 1) * len(every), found.tensors())
    return found


def _of_all_processes(mine: Evidence) -> Evidence:
    world = processes()[1]
    if world == 1:
        return mine
    parts: list[Evidence] = [mine] * world
    dist.all_gather_object(parts, mine)
    for other in parts[1:]:
        for name, statistics in parts[0].sources.items():
            for i, stats in statistics.items():
                stats.merge(other.sources[name][i])
    return parts[0]
