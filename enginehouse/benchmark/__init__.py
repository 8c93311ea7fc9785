"""Load on a gateway, and what came of it."""
