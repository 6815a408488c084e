"""Training the model: the objective, the random numbers it draws, and one step on any device. No Ray."""

from pyramid_flow.training.draws import KeyedDraws, TrainingDraws
from pyramid_flow.training.objective import (
    TrainingSample,
    spatial_pyramid_sample,
    temporal_pyramid_sample,
    velocity_loss,
)
from pyramid_flow.training.step import (
    Losses,
    Objective,
    initialise_transformer,
    optimizer_step,
    transformer_losses,
    velocity,
)

__all__ = [
    "KeyedDraws",
    "Losses",
    "Objective",
    "TrainingDraws",
    "TrainingSample",
    "initialise_transformer",
    "optimizer_step",
    "spatial_pyramid_sample",
    "temporal_pyramid_sample",
    "transformer_losses",
    "velocity",
    "velocity_loss",
]
