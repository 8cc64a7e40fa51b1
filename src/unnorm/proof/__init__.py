"""Proofs: at load, that the sites found are right; later, that a finished twin is what it is said to be."""
