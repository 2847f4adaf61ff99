"""What processes tell each other in a program: operators, and the sequence in which they run."""
