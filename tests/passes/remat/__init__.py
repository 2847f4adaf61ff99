"""Tests of `mlc/passes/remat`."""
