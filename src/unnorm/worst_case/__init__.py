"""Worst-case audit: inputs unlike the training text, on which a model without norms may blow up."""
