"""The recorder under which the user's function really runs: memories, views, writes, draws, cuts."""
