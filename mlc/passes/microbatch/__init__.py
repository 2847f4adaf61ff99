"""Micro-batches: the proof that the examples of a batch do not meet, and the loop over parts."""
