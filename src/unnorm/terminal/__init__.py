"""What is seen in a terminal: live progress, and a table for each verb."""
