"""Costs as formulas in trip counts and batch sizes, and where another plan becomes the better one."""
