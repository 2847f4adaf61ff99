"""Tests of `mlc/trace/python`."""
