"""Tests of `mlc/passes/microbatch`."""
