"""What the next step depends on: states of optimizers and trainings, and their files."""
