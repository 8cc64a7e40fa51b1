"""Norm sites: what they are, which modules read and write them, and how a traced pass finds them."""
