"""Tests of `mlc/runtime/inductor`."""
