"""Benchmarks: ratios measured side by side, each in one run on one machine."""
