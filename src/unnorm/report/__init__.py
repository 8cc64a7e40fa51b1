"""Self-contained HTML pages of a removal, an evaluation and an analysis, and the model card."""
