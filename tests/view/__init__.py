"""Tests of `mlc/view`."""
