"""Tests of `mlc/passes/autodiff`."""
