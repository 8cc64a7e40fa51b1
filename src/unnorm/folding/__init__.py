"""Constant maps into weights, and the checkpoints that come of it."""
