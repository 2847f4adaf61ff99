"""Tests of `mlc/trace/recorder`."""
