"""PreMoe (arXiv 2505.17639): the experts that a task needs, found from the router alone.

A *pattern* says how much a task needs every expert, and what its text looks like to the first
router. A *store* keeps the patterns of one model. A *specialist* is the model with the experts of
one task, a *generalist* with those of several; both are plans of whole experts. At serve time the
pattern nearest to a query is found again from the first router, and its experts are activated.
"""

from flexmoe.premoe.members import Specialists, activate, load
from flexmoe.premoe.pattern import Pattern
from flexmoe.premoe.profiling import profile
from flexmoe.premoe.retrieval import Match, retrieve
from flexmoe.premoe.specialist import compile_plan, specialise
from flexmoe.premoe.store import Store

__all__ = [
    "Match",
    "Pattern",
    "Specialists",
    "Store",
    "activate",
    "compile_plan",
    "load",
    "profile",
    "retrieve",
    "specialise",
]
