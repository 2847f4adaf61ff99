"""Tests of `mlc/passes/cost`."""
