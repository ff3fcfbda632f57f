"""flexmoe: rank once, cut anywhere, switch live.

Turns a Mixture-of-Experts language model into a nested family of smaller ones. Importing this is
quick and touches neither torch nor a GPU: what you use is loaded when you use it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from flexmoe._lazy import register_when_transformers_loads

if TYPE_CHECKING:
    from flexmoe.config import CompressConfig
    from flexmoe.elastic import release, restore
    from flexmoe.errors import FlexmoeError
    from flexmoe.exporter import export
    from flexmoe.family import load, set_budget
    from flexmoe.learn import LearnConfig
    from flexmoe.methods import method
    from flexmoe.pipeline import compress
    from flexmoe.plan import Plan
    from flexmoe.statistics import statistic

__version__ = "0.2.0"

_HOME = {
    "CompressConfig": "config",
    "FlexmoeError": "errors",
    "LearnConfig": "learn",
    "Plan": "plan",
    "compress": "pipeline",
    "export": "exporter",
    "load": "family",
    "method": "methods",
    "release": "elastic",
    "restore": "elastic",
    "set_budget": "family",
    "statistic": "statistics",
}
__all__ = [
    "CompressConfig",
    "FlexmoeError",
    "LearnConfig",
    "Plan",
    "compress",
    "export",
    "load",
    "method",
    "release",
    "restore",
    "set_budget",
    "statistic",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flexmoe' has no attribute '{name}'")
    return getattr(importlib.import_module(f"flexmoe.{_HOME[name]}"), name)


register_when_transformers_loads()
