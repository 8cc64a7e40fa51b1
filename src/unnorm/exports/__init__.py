"""Exports of the LN-free model to the formats of other tools.

The package is called `exports`, not `export`, so that the function `unnorm.export` keeps its name.
"""
