"""Pyramid flow matching: what the transformer sees in training, and what it should answer.

At level s the flow runs from x_start = start_s N_s + (1 - start_s) up(L_{s-1}) to x_end = end_s N_s + (1 - end_s) L_s,
where N and L are the pyramids of one noise and of the clean latents. The model sees x_r = r x_start + (1 - r) x_end at
a uniform ratio r, and answers v = x_start - x_end.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from pyramid_flow.errors import InvalidValueError
from pyramid_flow.sampling.pyramid import history_clips, latent_pyramid, noise_pyramid, upsample
from pyramid_flow.sampling.schedule import PyramidSchedule
from pyramid_flow.training.draws import TrainingDraws

MAX_CORRUPTION = 1 / 3


@dataclass(frozen=True)
class TrainingSample:
    """One evaluation of the transformer in training, and its answer.

    level: of the pyramid; history: past frames, each [B,C,1,h,w] at its level, oldest first; noisy: the current frames
    [B,C,T,h,w]; timestep [B] on the 0...1000 scale; ratio [B] of the noisy end; target: the velocity, as `noisy`.
    """

    level: int
    history: tuple[Tensor, ...]
    noisy: Tensor
    timestep: Tensor
    ratio: Tensor
    target: Tensor


def spatial_pyramid_sample(
    schedule: PyramidSchedule, level: int, latents: Tensor, draws: TrainingDraws
) -> TrainingSample:
    """Noise all frames of clean latents [B,C,T,h,w] alike, as for images; there is no history.

    Draws, per sample: noise [C,T,h,w], then the ratio.
    """
    num_levels, count = len(schedule.levels), schedule.num_train_timesteps
    if not 0 <= level < num_levels:
        raise InvalidValueError("level", level, f"is not one of {num_levels}")
    noise = noise_pyramid(draws.normal(latents.shape[1:]).to(latents), num_levels)[level]
    clean = latent_pyramid(latents, num_levels)
    at = schedule.levels[level]
    ratio = 1 - (count * draws.uniform()).floor().clamp(0, count - 1).to(latents) / count
    start = at.start * noise + (1 - at.start) * upsample(clean[level - 1]) if level else noise
    end = at.end * noise + (1 - at.end) * clean[level]
    share = _column(ratio)
    return TrainingSample(
        level=level,
        history=(),
        noisy=share * start + (1 - share) * end,
        timestep=at.final_timestep + (at.first_timestep - at.final_timestep) * ratio,
        ratio=ratio,
        target=start - end,
    )


def temporal_pyramid_sample(
    schedule: PyramidSchedule, level: int, latents: Tensor, draws: TrainingDraws
) -> TrainingSample:
    """Noise the last frame of clean latents [B,C,T,h,w]; the frames before it are its corrupted history.

    The history is laid out as the sampler has it, and every frame h of a sample becomes c e + (1 - c) h with one
    c ~ U[0, 1/3) and fresh white noise e; the timestep does not tell c. Draws, per sample: noise [C,1,h,w], the ratio,
    c, then e for every past frame, newest first.
    """
    sample = spatial_pyramid_sample(schedule, level, latents[:, :, -1:], draws)
    strength = _column(MAX_CORRUPTION * draws.uniform()).to(latents)
    frames = latents[:, :, :-1].split(1, dim=2) if latents.shape[2] > 1 else ()
    clips = history_clips([latent_pyramid(frame, len(schedule.levels)) for frame in frames], level)
    history = [strength * draws.normal(clip.shape[1:]).to(clip) + (1 - strength) * clip for clip in reversed(clips)]
    return replace(sample, history=tuple(reversed(history)))


def velocity_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the mean squared error of each sample in float32: [B]."""
    return (predicted.float() - target.float()).square().flatten(1).mean(dim=1)


def _column(values: Tensor) -> Tensor:
    """[B] -> [B,1,1,1,1]."""
    return values.view(-1, 1, 1, 1, 1)
