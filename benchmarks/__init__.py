"""Cost and quality of arg_dist next to other optimizers: ``python -m benchmarks.step`` etc."""
