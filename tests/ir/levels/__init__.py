"""Tests of `mlc/ir/levels`."""
