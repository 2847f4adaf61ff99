"""Tests of `mlc/passes/lowering`."""
