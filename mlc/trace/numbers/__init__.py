"""Python numbers that were read from tensors: what they are, how they go on, decide, or leave."""
