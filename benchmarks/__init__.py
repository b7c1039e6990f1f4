"""Measurements that anyone can repeat. Results, with machine, versions and date, are in `benchmarks/results/`."""
