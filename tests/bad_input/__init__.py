"""What can't work is refused: exit code 2, one message with cause and remedy, no traceback, nothing written."""
