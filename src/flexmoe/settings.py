"""Numbers in a nested config.json: where one stands, and the same config with others there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

Place = tuple[str, ...]  # the keys that lead to a value


def places(config: Mapping[str, Any], value: int, prefix: Place = ()) -> Iterator[Place]:
    """Where ``value`` stands in a config."""
    for key, found in config.items():
        if isinstance(found, dict):
            yield from places(found, value, (*prefix, key))
        elif type(found) is int and found == value:
            yield (*prefix, key)


def with_value(config: Mapping[str, Any], place: Place, value: int) -> dict[str, Any]:
    """A copy of the config with ``value`` at ``place``."""
    return with_values(config, {place: value})


def with_values(config: Mapping[str, Any], values: Mapping[Place, int]) -> dict[str, Any]:
    """A copy of the config with these values at their places, which are made where they are not."""
    new = deepcopy(dict(config))
    for place, value in values.items():
        inner = new
        for key in place[:-1]:
            inner = inner.setdefault(key, {})
        inner[place[-1]] = value
    return new
