"""Precision per level and flow: policies, what they mean for one program, and the rewriting that carries them out."""
