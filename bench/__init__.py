"""Benchmarks: one clock, one row format, one file a question. Results are kept in `results/`, one folder a machine."""

from bench import turns as turns  # before anything slow is imported, which would disturb the other's runs
