"""Tests of `mlc/record`."""
