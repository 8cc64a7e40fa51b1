"""Folding constant maps into weights, and the checkpoints that result."""
