"""Checkpoint -> engine: everything that knows a model family or a checkpoint format."""

import protos  # noqa: F401  (before grpc)
