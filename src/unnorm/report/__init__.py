"""Metrics to one self-contained HTML page that proves and shows what a removal did."""
