"""Prompt -> executor -> text: tokenizers, chat templates, routing, incremental text."""

import protos  # noqa: F401  (before grpc)
