"""Levels and flows of a program as graphs: which level reads which, and one level as functions of its own."""
