"""Tests of `mlc/passes/planning`."""
