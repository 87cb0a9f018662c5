"""Checkpoints of the large engines in their genuine formats, small or with random weights, for tests."""
