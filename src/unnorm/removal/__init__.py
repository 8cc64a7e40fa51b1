"""One run of `unnorm remove`: its directory, its blocks, the path itself, and what it ends with."""
