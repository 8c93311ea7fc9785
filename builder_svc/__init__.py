"""Checkpoint -> engine: everything that knows a model family or a checkpoint format."""
