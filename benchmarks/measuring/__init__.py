"""Shared by the benchmarks: interleaved timing, fresh processes, memory accounting, tables."""
