"""Reads checkpoints: a config, and tensors by name."""
