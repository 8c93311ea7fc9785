"""Prompt -> executor -> text: tokenizers, chat templates, routing, incremental text."""
