"""Tests of `mlc/passes/rules`."""
