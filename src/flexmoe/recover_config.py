"""What `flexmoe.recover` can be told, and what is refused before anything slow starts."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from flexmoe.data import check_seed, pick_batch_size
from flexmoe.distil import SCHEMES
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.family import pick_device
from flexmoe.lora import NEEDS_PEFT
from flexmoe.sharding import check_processes
from flexmoe.training import processes

MODES = ("closed-form", "router", "lora", "full")
# Learning rates measured on models of hidden size 128, and how they fall with the hidden size: as
# for Adam on whole matrices (1/H), more gently where little changes. Rules of thumb beyond that.
RATES = {"full": 1e-3, "lora": 1e-3, "router": 1e-3}
MEASURED_HIDDEN = 128
RANK = 16  # of LoRA
AT = 0.4  # the paper's single point
TOKENS = {"closed-form": 131_072, "router": 600_000, "lora": 1_200_000, "full": 1_200_000}


@dataclass(frozen=True)
class RecoverConfig:
    """What `recover` can be told; None means the default of the mode (docs/log.md says why).

    ``scheme`` is ``family`` (all budgets in every step), ``sp`` (one budget, ``at``, the paper's;
    the default when ``at`` is given) or ``cp`` (the paper's sandwich). ``labels``: how much the
    next token counts beside the teacher in ``family`` (0: not at all). ``tokens`` of text are read
    once, more are drawn again.
    ``shard`` splits the model over all processes, see `sharding`. With ``memory`` (bytes) the
    closed form goes layer by layer and no more is held.
    """

    mode: str = "full"
    scheme: str | None = None
    at: float | None = None
    labels: float | None = None
    data: str = "tiny"
    tokens: int | None = None
    seq_len: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    lr: float | None = None
    rank: int | None = None
    checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    shard: bool = False
    memory: int | None = None

    @property
    def picked_scheme(self) -> str:
        """The scheme, where anything is trained."""
        return self.scheme or ("family" if self.at is None else "sp")

    @property
    def picked_at(self) -> float:
        """The budget that ``sp`` trains."""
        return AT if self.at is None else self.at


def check_recovery(config: RecoverConfig) -> None:
    """Refuse what cannot work, or would have no effect, before anything slow starts."""
    if config.mode not in MODES:
        raise did_you_mean(config.mode, MODES, "mode")
    if config.mode == "lora" and find_spec("peft") is None:
        raise FlexmoeError(NEEDS_PEFT)
    if config.scheme is not None and config.scheme not in SCHEMES:
        raise did_you_mean(config.scheme, SCHEMES, "scheme")
    unread = {
        "at": config.mode != "closed-form" and config.scheme in (None, "sp"),
        "scheme": config.mode != "closed-form",
        "labels": config.mode != "closed-form" and config.picked_scheme == "family",
        "lr": config.mode != "closed-form",
        "micro_batch": config.mode != "closed-form",
        "checkpointing": config.mode != "closed-form",
        "rank": config.mode == "lora",
        "shard": config.mode in ("full", "router"),
        "memory": config.mode == "closed-form",
    }
    for name, read in unread.items():
        value = getattr(config, name)
        if value is not None and value is not False and not read:
            schemes = {} if config.mode == "closed-form" else {"at": "sp", "labels": "family"}
            scheme = schemes.get(name)
            hint = f" (it belongs to scheme '{scheme}')" if scheme else ""
            raise FlexmoeError(
                f"{name} has no effect with mode '{config.mode}'{hint}: leave it out"
            )
    if config.at is not None and not 0 < config.at < 1:
        raise FlexmoeError(f"at must lie between 0 and 1, found {config.at:g}: 0.4 means 40 %")
    for name in ("tokens", "micro_batch", "rank"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise FlexmoeError(f"{name} must be at least 1, found {value}")
    if config.lr is not None and not 0 < config.lr < 1:
        raise FlexmoeError(f"lr must lie between 0 and 1, found {config.lr:g}")
    if config.labels is not None and not 0 <= config.labels <= 10:
        raise FlexmoeError(f"labels must lie between 0 and 10, found {config.labels:g}")
    check_seed(config.seed)
    pick_batch_size(config.batch_size, 1)
    pick_device(config.device)
    if config.shard:
        check_processes()
    if config.memory is not None and processes()[1] > 1:
        raise FlexmoeError("a limit of memory works with one process: leave out torchrun")


def default_rate(mode: str, hidden: int) -> float:
    """The learning rate of a mode for a model of this hidden size; 0 where nothing is trained."""
    falls = MEASURED_HIDDEN / hidden
    return RATES.get(mode, 0.0) * (falls if mode == "full" else falls**0.5)
