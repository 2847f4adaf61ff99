"""Tests of `mlc/passes/formulas`."""
