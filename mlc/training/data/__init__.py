"""Batches: where they come from, where a feed is, and what one step of a block is fed with."""
