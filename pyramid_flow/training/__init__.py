"""Training the model: the objective, the random numbers it draws, and one step on any device. No Ray."""
