"""Engine -> tokens. Knows no model family, no tokenizer, no checkpoint format."""

import protos  # noqa: F401  (before grpc)
