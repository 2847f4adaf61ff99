"""The compiled function: its recordings, its calls."""
