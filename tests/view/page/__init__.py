"""Tests of `mlc/view/page`."""
