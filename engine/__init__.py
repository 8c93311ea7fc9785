"""The artifact contract between those who build engines and those who run them."""
