"""Primitives without equations: what a program runs as it is."""
