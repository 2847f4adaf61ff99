"""Segments of a region compiled by Inductor: cut, compiled in workers, tried, kept on disk."""
