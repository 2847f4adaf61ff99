"""Tests of `mlc/passes/levels`."""
