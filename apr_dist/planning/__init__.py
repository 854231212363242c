"""What can be computed before a run: sizes, memory, time, what fits. Nothing here builds a model."""
