"""From norm to constant: the module that stands in for a norm, and which recipe removes which site when."""
