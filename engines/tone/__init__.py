"""Deterministic tones instead of speech: the engine of tests, docs and the tutorial."""
