"""Analyses of a twin beside its original, each next to an independent computation on the same model."""
