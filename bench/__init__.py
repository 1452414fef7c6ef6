"""Benchmarks: never timed tests, always a correctness check first; see bench/README.md."""
