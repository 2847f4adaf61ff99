"""Tests of `mlc/trace/numbers`."""
