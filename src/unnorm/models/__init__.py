"""Models and tokenizers: loaded and checked, and what holds of a model in memory."""
