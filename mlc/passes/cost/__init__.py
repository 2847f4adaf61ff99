"""What equations and stages cost: flops, bytes, seconds, peak memory, and the timeline of both."""
