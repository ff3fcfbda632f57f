"""What `compress` can be told, and the refusal of what cannot work."""

from __future__ import annotations

from dataclasses import dataclass

from flexmoe.actions import ActionConfig
from flexmoe.allocate import PRIMARY
from flexmoe.data import check_seed, pick_batch_size
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.family import pick_device
from flexmoe.learn import LearnConfig
from flexmoe.methods import find_method
from flexmoe.rco import RcoConfig
from flexmoe.reference import check_reference
from flexmoe.routing.rules import MEAN, check_rule
from flexmoe.sequential import check_sequential
from flexmoe.sharding import check_processes
from flexmoe.statistics import find_statistics
from flexmoe.training import processes
from flexmoe.widths import BUDGETS

SAMPLES = 128  # windows of calibration text
ALLOCATORS = (*PRIMARY, "learned", "actions", "rco")
OF_EXPERTS = ("layer", "global", "rco")  # those for whole experts
# the allocators that learn
SETTINGS_OF: dict[str, type[LearnConfig] | type[ActionConfig] | type[RcoConfig]] = {
    "learned": LearnConfig,
    "actions": ActionConfig,
    "rco": RcoConfig,
}


@dataclass(frozen=True)
class CompressConfig:
    """What `compress` can be told. None means the default that fits the model; the defaults are
    those that measured best on held-out text (docs/log.md). ``shard`` splits the model over all
    processes, see `sharding`. With ``memory`` (bytes) the model is observed layer by layer and no
    more than that is held, see `streaming`. ``allocate`` None is the method's own. ``reference``: a
    second checkpoint, for methods that compare with one. ``sequential``: score every layer with
    those before it pruned at this share. ``router``: what becomes of it where whole experts go, see
    `routing.rules`."""

    data: str | None = None
    samples: int | None = None
    seq_len: int | None = None
    pruned: tuple[float, ...] = BUDGETS
    method: str = "fisher"
    allocate: str | None = None
    reference: str | None = None
    sequential: float | None = None
    router: str = "keep"
    quantum: int | None = None
    batch_size: int | None = None
    micro_batch: int | None = None
    checkpointing: bool = False
    learn: LearnConfig | ActionConfig | RcoConfig | None = None
    seed: int = 0
    device: str = "auto"
    shard: bool = False
    memory: int | None = None

    @property
    def needs_data(self) -> bool:
        """Whether calibration text is read at all."""
        return bool(self.needs) or self.allocator in SETTINGS_OF or find_method(self.method).learns

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that the pass over the text must fill."""
        return find_method(self.method).needs + MEAN * (self.router == "constant")

    @property
    def allocator(self) -> str:
        """What ``allocate`` says, or else the method's own; where the model does not fit into
        ``memory`` none that learns."""
        own = find_method(self.method).allocate
        if self.memory is not None and own in SETTINGS_OF:
            own = "global"
        return self.allocate or own


def check_config(config: CompressConfig) -> None:
    """Refuse what cannot work, or would have no effect, before anything slow starts."""
    method = find_method(config.method, anew=True)
    if config.allocator not in ALLOCATORS:
        raise did_you_mean(config.allocator, ALLOCATORS, "allocator")
    check_reference([method], config.reference)
    check_rule(config.router, method.unit)
    if config.sequential is not None:
        check_sequential(method, config.sequential)
        if config.memory is not None:
            raise FlexmoeError("sequential needs the whole model in memory: leave out --memory")
        if config.router == "constant":
            raise FlexmoeError("router rule 'constant' does not work with sequential: leave it out")
    if method.unit == "expert":
        if config.allocator not in OF_EXPERTS:
            raise FlexmoeError(
                f"method '{config.method}' scores whole experts, allocate '{config.allocator}' is "
                "of channels: use layer (the same number in every layer), global or rco (learned)"
            )
        if config.quantum is not None:
            raise FlexmoeError(
                f"quantum has no effect: method '{config.method}' removes whole experts"
            )
    if not config.pruned or not all(0 < share < 1 for share in config.pruned):
        raise FlexmoeError(
            f"pruned shares must lie between 0 and 1, found {list(config.pruned)}: "
            "0.4 means 40 % of the routed-expert parameters removed"
        )
    if config.quantum is not None and config.quantum < 1:
        raise FlexmoeError(f"quantum must be at least 1 channel, found {config.quantum}")
    check_seed(config.seed)
    pick_batch_size(config.batch_size, 1)
    unread = ("data", "samples", "seq_len", "batch_size")
    asked = [name for name in unread if getattr(config, name) is not None]
    if asked and not config.needs_data:
        raise FlexmoeError(
            f"{', '.join(asked)} without effect: method '{config.method}' with allocate "
            f"'{config.allocator}' looks at the weights only"
        )
    wanted = SETTINGS_OF.get(config.allocator)
    if config.learn is not None and not (wanted and isinstance(config.learn, wanted)):
        raise FlexmoeError(
            f"settings of learning have no effect with allocate '{config.allocator}': use 'learned'"
        )
    for name in ("micro_batch", "checkpointing"):
        if getattr(config, name) and config.allocator != "learned":
            raise FlexmoeError(f"{name} has an effect with allocate 'learned' only")
    if config.micro_batch is not None and config.micro_batch < 1:
        raise FlexmoeError(f"micro-batch must be at least 1 window, found {config.micro_batch}")
    if (config.shard or config.memory is not None) and method.learns:
        raise FlexmoeError(
            f"method '{config.method}' learns on the whole model: leave out --shard and --memory"
        )
    if config.shard:
        if config.allocator in ("actions", "rco"):
            raise FlexmoeError(
                f"shard does not work with allocate '{config.allocator}': use 'learned'"
            )
        needs = find_statistics(method.needs)
        if any(statistic.when == "weights" for statistic in needs):
            raise FlexmoeError(
                f"shard does not work with method '{config.method}', which looks at the gradients "
                "of whole weights: use 'fisher' or 'heapr'"
            )
        check_processes()
    if config.memory is not None:
        if config.allocator in SETTINGS_OF:
            raise FlexmoeError(
                f"allocate '{config.allocator}' needs the whole model in memory: with a limit of "
                "memory use --allocate global"
            )
        if config.shard or processes()[1] > 1:
            raise FlexmoeError(
                "a limit of memory works with one process: leave out torchrun and --shard, or "
                "--memory"
            )
    pick_device(config.device)


def budget_list(text: str) -> tuple[float, ...]:
    """``0.1,0.2`` as shares; a `FlexmoeError` if there is none or one is no number."""
    try:
        shares = tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        shares = ()
    if len(set(shares)) < len(shares):
        raise FlexmoeError(f"'{text}' has a pruned share twice: leave one of them out")
    if not shares:
        raise FlexmoeError(
            f"'{text}' is no list of pruned shares: write 0.4 or 0.1,0.2,0.4 (40 % is 0.4)"
        )
    return shares
