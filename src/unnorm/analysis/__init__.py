"""What a norm-free model makes exact, measured in the twin and beside it in the original.

Each file is one analysis: a function that returns tensors, and `find`, which makes numbers and figures of them for
`unnorm analyze`.
"""
