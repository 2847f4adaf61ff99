"""Levels and flows of a program: what trains what, what enters where, which edges carry a derivative."""
