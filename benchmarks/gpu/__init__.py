"""All that a GPU can tell in nine minutes: ``python -m benchmarks.gpu``."""
