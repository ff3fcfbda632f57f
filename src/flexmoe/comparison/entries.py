"""What is compared: a method with an allocation and a router rule, its paper's or others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from flexmoe.config import ALLOCATORS, CompressConfig
from flexmoe.errors import FlexmoeError, did_you_mean
from flexmoe.methods import Method, all_methods, find_method
from flexmoe.routing.rules import RULES

ALL = "all"
BASELINE = {"channel": "random", "expert": "random-experts"}  # by unit


@dataclass(frozen=True)
class Entry:
    """A method and how its scores become a plan. ``spec`` is what the method was asked for as."""

    spec: str
    method: Method
    allocate: str
    router: str

    @property
    def name(self) -> str:
        """The method's name, and what differs from its defaults: ``fisher@global``,
        ``reap+keep``."""
        name = self.method.name
        if self.allocate != self.method.allocate:
            name += f"@{self.allocate}"
        return name + f"+{self.router}" * (self.router != self.method.router)

    def config(self, common: CompressConfig) -> CompressConfig:
        """``common`` settings for this entry; those that it does not read are left out."""
        own = replace(
            common,
            method=self.spec,
            allocate=self.allocate,
            router=self.router,
            reference=common.reference if self.method.reference else None,
        )
        if own.needs_data:
            return own
        return replace(own, data=None, samples=None, seq_len=None, batch_size=None)


def parse(text: str) -> Entry:
    """``METHOD[@ALLOCATE][+ROUTER]``, the method by name or as FILE.py:FUNCTION."""
    rest, plus, router = text.rpartition("+")
    rest = rest if plus else text
    spec, at, allocate = rest.rpartition("@")
    method = find_method(spec if at else rest, anew=True)
    if at and allocate not in ALLOCATORS:
        raise did_you_mean(allocate, ALLOCATORS, "allocator")
    if plus and router not in RULES:
        raise did_you_mean(router, RULES, "router rule")
    return Entry(
        spec if at else rest,
        method,
        allocate if at else method.allocate,
        router if plus else method.router,
    )


def chosen(methods: Sequence[str]) -> list[Entry]:
    """The entries that ``methods`` asks for (``all``: every method that comes with flexmoe), each
    once, and the random baseline of every unit among them."""
    if not methods:
        raise FlexmoeError("no method to compare: give some with --methods, or 'all'")
    names = [n for text in methods for n in (sorted(all_methods()) if text == ALL else [text])]
    found = [parse(name) for name in names]
    for unit, name in BASELINE.items():
        units = {entry.method.unit for entry in found}
        if unit in units and all(entry.method.name != name for entry in found):
            found.append(parse(name))
    return list({entry.name: entry for entry in found}.values())
