"""Numerics and semantics acceptance: compiled loops against independent float64 references."""
