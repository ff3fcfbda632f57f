"""What a server is told (`ServeSettings`) and what it needs of an engine (`Engine`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmoe.files import Strict
from flexmoe.serve.ids import Budgets, label

if TYPE_CHECKING:
    from flexmoe.premoe import Match


class ServedMember(Strict):
    """One budget: its figures (see `flexmoe.plan.Member`), and as measured (None: it was not) the
    loss in nats per token and the share of the full model's likelihood per token it keeps."""

    pruned: float
    routed_parameters: int
    bytes: int
    nll: float | None = None
    kept: float | None = None

    @property
    def budget(self) -> str:
        """Its label."""
        return label(self.pruned)


class ServedTask(Strict):
    """A task of a pattern store: what the model with its experts alone comes to."""

    task: str
    pruned: float
    routed_parameters: int
    bytes: int


class Slo(Strict):
    """What the policy holds: 95 % of requests within ``ttft_ms`` to the first token and ``tpot_ms``
    for each further one, by moving the default between the budgets ``richest`` and ``poorest``
    (labels)."""

    ttft_ms: float
    tpot_ms: float
    richest: str
    poorest: str


class ServeSettings(Strict):
    """All that a server needs to know, as the command line worked it out. Plain data: it goes as
    JSON into processes that an engine starts.

    ``model``: folder of a family, plan, export or checkpoint; ``base``: weights for a plan alone;
    ``name``: the model id; ``members``: the budgets to serve, rich to poor; ``default``: label of
    the budget of requests that name none; ``max_body``: bytes a request may have;
    ``strict_timeout``: seconds a strict switch waits for requests at other budgets; ``kv_tokens``:
    tokens the KV cache has room for (None: the engine decides); ``patterns``: folder of a pattern
    store, whose ``tasks`` keep the share ``keep`` of the experts.
    """

    model: str
    name: str
    members: tuple[ServedMember, ...]
    default: str
    base: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    max_body: int = 8 * 2**20
    strict_timeout: float = 60.0
    slo: Slo | None = None
    device: str = "auto"
    dtype: str = "auto"
    kv_tokens: int | None = None
    patterns: str | None = None
    keep: float = 1.0
    tasks: tuple[ServedTask, ...] = ()

    @property
    def budgets(self) -> Budgets:
        """Ids and labels of the members and tasks."""
        shares = tuple(member.pruned for member in self.members)
        return Budgets(self.name, shares, tuple(task.task for task in self.tasks))


class Engine:
    """What the middleware needs of an engine; subclass it.

    ``model`` is the one name under which the engine knows the model: requests are sent on with it,
    and it is replaced in the answers. ``has_metrics`` says whether the engine itself answers
    ``GET /metrics`` with the default registry of prometheus-client. ``no_release`` says why it
    cannot give memory back while it runs; empty if it can.
    """

    model: str
    has_metrics: bool = False
    no_release: str = ""

    def mark(self, body: dict, budget: str) -> dict:
        """The JSON body of a request with its ``budget`` (a label, or a task) put where the engine
        reads it, whatever a client had put there."""
        raise NotImplementedError

    async def retrieve(self, body: dict) -> Match:
        """The task that a request's prompt needs, of an engine that serves tasks."""
        raise NotImplementedError

    async def on_switch(self, budget: str) -> None:
        """Called before ``budget`` becomes the default; an exception keeps the one before."""

    async def keep(self, richest: str) -> int:
        """Have the weights in memory that the budget ``richest`` and poorer ones need, and no
        others; returns the bytes given back, negative where some were read again. A `FlexmoeError`
        where they cannot be read. Nothing runs at richer budgets while it works."""
        raise NotImplementedError
