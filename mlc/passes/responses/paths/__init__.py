"""Paths from meta-parameters to the result: which are off, and how their flows are cut."""
