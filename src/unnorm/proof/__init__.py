"""That sites are found right, when a model is loaded, and that a finished twin is what it is said to be."""
