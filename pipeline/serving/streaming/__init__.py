"""Videos while they are made: progress of the sampler, and units that are decoded and stored as fragments."""
