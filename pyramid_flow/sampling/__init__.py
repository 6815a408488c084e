"""The sampler: from noise to latents, through the levels of the pyramid, unit by unit. Schedules, noise, the velocity
with its guidance, and the parameters of a clip belong here; layers of the transformer and pixels do not.
"""
