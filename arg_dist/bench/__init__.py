"""What a step costs: timings of the optimizer beside others and beside what no method can avoid."""
