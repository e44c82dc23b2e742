"""Benchmarks. No test passes or fails by a time."""
