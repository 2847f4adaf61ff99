"""Looking at programs and plans: explanations, listings, differences, diagrams and the files that hold them."""
