"""From a module to what executors run."""
