"""Tests of `mlc/ir/lowered`."""
