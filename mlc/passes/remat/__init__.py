"""What is kept and what is computed again: residuals, states, segments, and where kept values rest."""
