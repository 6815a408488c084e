"""Training on tables: what a sample is, what is trained on it, and the workers that share the work."""
