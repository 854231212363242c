"""Processes: starting them, agreeing, and moving weights between a file and the ranks."""
