"""One run: its settings, the plan made from them, its directory and its text."""
