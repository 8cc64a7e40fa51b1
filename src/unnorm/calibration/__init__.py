"""Steps before training: constant scales from forward passes, and what makes scales more even."""
