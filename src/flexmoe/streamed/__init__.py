"""The observe pass and the refit of models larger than memory, one decoder layer at a time."""
