"""Generated training programs, and what judges them: see docs/fuzzing.md."""
