"""How levels hang together: what losses read, which level stands below which, the loops that this stands for."""
