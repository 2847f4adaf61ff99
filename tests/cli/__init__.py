"""Tests of `mlc/cli`."""
