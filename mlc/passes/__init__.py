"""Passes: from a program to a plan and from a plan to stage graphs."""
