"""The observe pass over models larger than memory, one decoder layer at a time."""
