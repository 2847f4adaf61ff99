"""The pipeline of passes: from a program to its stage graphs, one pass after the other."""
