"""Benchmarks: one clock, one row format, one file a question. Results are kept in `results/`, one folder a machine."""
