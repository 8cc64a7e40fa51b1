"""Models and tokenizers: loading and checking them, and helpers for models in memory."""
