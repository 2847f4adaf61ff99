"""Tests of `mlc/trace/gradients`."""
