"""Differentiation of regions: forward, reverse, mixed mode, loops, Jacobian columns."""
