"""The Python side of a call: frames, what code reads, and the user's objects before and after."""
