"""Choosing a plan: the search over levers under a budget, and the decisions as data."""
