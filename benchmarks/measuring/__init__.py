"""What the benchmarks share: optimizers in turns, fresh processes, memory, tables."""
