"""Self-contained HTML pages of a removal and an evaluation, what all pages share, and the model card."""
