"""Tests of `mlc/passes/rolling`."""
