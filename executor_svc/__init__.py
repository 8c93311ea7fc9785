"""Engine -> tokens. Knows no model family, no tokenizer, no checkpoint format."""
