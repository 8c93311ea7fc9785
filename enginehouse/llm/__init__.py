"""Generation from Python: an engine in a worker process of this program's own, or a running cluster."""
