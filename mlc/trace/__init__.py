"""From the user's function to a program: the tracer and what it knows of Python and PyTorch."""
