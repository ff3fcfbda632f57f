"""Every request gets its budget where it enters vLLM, and a prefix cache of that budget.

The budget is named in ``SamplingParams.extra_args["flexmoe_budget"]`` (over HTTP: ``vllm_xargs``).
A request that names none gets the default of the moment and keeps it: a switch touches no running
request. What a request left in the prefix cache holds for its budget only, so the budget goes into
the salt of the cache, here, where no client can leave it out.
"""

from __future__ import annotations

from typing import Any

from flexmoe.errors import FlexmoeError
from flexmoe.serve.vllm.compat import BUDGET

_default: str | None = None  # None: the richest budget served


def set_default(budget: str | None) -> None:
    """The budget of requests to come that name none, in this process."""
    global _default
    _default = budget


def pin(run: Any, request: Any) -> None:
    """Check the request's budget, or give it the default; salt its prefix cache."""
    rows = getattr(run.quant_config, "rows", None)
    params = request.sampling_params
    if rows is None or params is None:
        return
    extra = dict(params.extra_args or {})
    budget = extra.get(BUDGET) or _default or next(iter(rows))
    if budget not in rows:
        raise UnknownBudget(
            f"budget '{budget}' is not served here; the budgets are {', '.join(rows)}"
        )
    params.extra_args = {**extra, BUDGET: budget}
    request.cache_salt = f"{BUDGET}:{budget}:{request.cache_salt or ''}"


class UnknownBudget(FlexmoeError, ValueError):
    """vLLM answers a ValueError with status 400."""
