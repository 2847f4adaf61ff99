"""Executing plans: stage graphs, loops, draws, the autograd node."""
