"""The IR: text form, verifier, level graph, graphs of levels."""
