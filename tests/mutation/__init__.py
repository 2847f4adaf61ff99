"""A mutation suite: faults planted in mlc one at a time, and whether the tests notice each."""
