"""Gradients that the user's loop takes, its backward hooks, and the plain unroll of a recording."""
