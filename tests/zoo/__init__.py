"""Tiny copies of real architectures, and the hypergradient through each."""
