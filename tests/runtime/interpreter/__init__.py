"""Tests of `mlc/runtime/interpreter`."""
