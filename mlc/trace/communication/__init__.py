"""Communication between processes in the user's loop: collectives, data parallelism, and whether all do alike."""
