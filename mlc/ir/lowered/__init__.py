"""The executable form of a program: stage graphs, when their states are kept, which equations write in place."""
