"""How weights move: AdamW's settings, which weights decay, and the learning rate of each step."""

from dataclasses import dataclass
from math import cos, pi
from typing import Any, Literal

from torch import nn


@dataclass(frozen=True)
class OptimizerSettings:
    """AdamW with a linear warm-up to `lr`, then constant or a half cosine to a fiftieth of it.

    ema_decay: of the running mean of the weights, which is what a training gives in the end; None = no mean. bfloat16:
    compute in it where autocast thinks fit; weights stay float32.
    """

    lr: float = 5e-5
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 1e-4
    warmup_steps: int = 1000
    decay: Literal["constant", "cosine"] = "constant"
    max_grad_norm: float = 1.0
    ema_decay: float | None = None
    bfloat16: bool = True


LEAST_SHARE = 0.02


def learning_rate(settings: OptimizerSettings, step: int, num_steps: int) -> float:
    """Return the learning rate of a step, counted from 0."""
    warmup = min(1.0, (step + 1) / max(1, settings.warmup_steps))
    share = 0.5 * (1 + cos(pi * step / num_steps)) if settings.decay == "cosine" else 1.0
    return settings.lr * warmup * max(LEAST_SHARE, share)


def parameter_groups(model: nn.Module, settings: OptimizerSettings) -> list[dict[str, Any]]:
    """Return the weights that are trained in two groups: matrices and kernels decay, scales and biases do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decaying = [parameter for parameter in trained if parameter.ndim >= 2]
    others = [parameter for parameter in trained if parameter.ndim < 2]
    groups = [
        {"params": decaying, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
