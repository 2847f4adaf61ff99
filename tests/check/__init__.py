"""Tests of `mlc/check`."""
