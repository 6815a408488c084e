"""Device memory: how much each part of a model needs, which memory mode fits, and when weights are on the device."""
