"""The compiled function: its cache of programs, its calls, what they leave and report."""
