"""Measurements that write CSV files to benchmarks/results/."""
