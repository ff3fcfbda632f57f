"""Plug into transformers without importing it: ``import flexmoe`` must stay fast."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

# What every model class imports, and the last module to be complete of those the plug-in needs.
TARGET, PLUGIN = "transformers.modeling_utils", "flexmoe.hf"


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the real finders find ``TARGET`` and imports ``PLUGIN`` once it has been executed."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != TARGET:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, real: importlib.abc.Loader):
        self.real = real

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.real.exec_module(module)
        importlib.import_module(PLUGIN)


def register_when_transformers_loads() -> None:
    """Register the plug-in now if transformers' models are loaded, otherwise as soon as they
    are. Calling it again does nothing."""
    if TARGET in sys.modules:
        importlib.import_module(PLUGIN)
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
