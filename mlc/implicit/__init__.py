"""Implicit differentiation: linear solvers that apply an operator, and roots of optimality conditions."""
