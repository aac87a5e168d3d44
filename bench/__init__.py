"""Benchmarks of rebalfer_kernels against what else computes the same; see ``python -m bench --help``."""
