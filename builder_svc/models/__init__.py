"""One decoder over the operator set, steered by a config that the families' pages make."""
