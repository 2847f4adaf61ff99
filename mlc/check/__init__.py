"""``mlc.check``: whether a hypergradient is right."""
