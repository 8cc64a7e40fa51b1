"""Analyses that become exact in a norm-free model, run on the twin and on the original side by side.

Each file is one analysis: a function that returns tensors, and `find`, which turns them into numbers and figures for
`unnorm analyze`.
"""
