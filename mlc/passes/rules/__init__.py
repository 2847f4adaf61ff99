"""Derivative rules of single operators: recorded from PyTorch's formulas, or spelled out where those are wrong."""
