"""Differentiation of regions: forward, reverse, mixed mode, loops, Jacobian columns."""

from mlc.passes.autodiff import loops as _loops  # noqa: F401 (fills the tables of rules with those of loops)
