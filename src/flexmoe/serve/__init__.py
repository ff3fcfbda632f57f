"""Serving: every budget is a model id of one OpenAI-compatible server.

One ASGI middleware stands in front of an engine's own application: it turns model ids into
budgets, pins the default, counts, and answers ``/flexmoe/*``. The engine computes.
"""
