"""What arg_dist costs and achieves beside its rivals: ``python -m benchmarks.step`` and others."""
