"""Other tools' forms of the same model.

The room is called `exports` and not `export`, so that the function `unnorm.export` keeps its name.
"""
