"""One run of `unnorm remove`: its directory, its blocks, the procedure itself, and its results."""
