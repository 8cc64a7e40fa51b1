"""Terminal output: live progress, and tables for each command."""
