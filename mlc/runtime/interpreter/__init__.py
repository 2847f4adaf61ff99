"""Running regions: straight Python per region, loops, draws, states, saved tensors."""
