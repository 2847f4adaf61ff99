"""Recording operators as functional equations."""
