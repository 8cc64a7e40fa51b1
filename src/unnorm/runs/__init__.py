"""One run: its settings, the plan made from them, its lock and its text."""
