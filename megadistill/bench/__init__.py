"""Benchmarks behind tools/bench.py: ratios within one run, since machines differ and are noisy."""
