"""One run: its settings, what is planned from them, its directory and its text."""
