"""Training the model: the objective, the random numbers it draws, and one step on any device. No Ray."""

from pyramid_flow.training.draws import KeyedDraws, TrainingDraws
from pyramid_flow.training.objective import (
    TrainingSample,
    spatial_pyramid_sample,
    temporal_pyramid_sample,
    velocity_loss,
)

__all__ = [
    "KeyedDraws",
    "TrainingDraws",
    "TrainingSample",
    "spatial_pyramid_sample",
    "temporal_pyramid_sample",
    "velocity_loss",
]
