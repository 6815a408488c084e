"""One training step of the transformer, on any device: losses of a batch, and the optimizer's step on their mean."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from pyramid_flow.errors import InvalidValueError, ShapeError
from pyramid_flow.sampling.schedule import PyramidSchedule
from pyramid_flow.text.embedding import TextEmbedding, concatenate
from pyramid_flow.training.draws import TrainingDraws
from pyramid_flow.training.objective import TrainingSample, temporal_pyramid_sample, velocity_loss
from pyramid_flow.transformer.layers import Modulation
from pyramid_flow.transformer.model import PyramidTransformer


@dataclass(frozen=True)
class Objective:
    """What is trained how often.

    levels: the level that sample i of the global batch trains is levels[i % len(levels)]; level_weights: weight of each
    level's loss; text_dropout: share of the samples whose prompt is replaced by the empty one; first_frame_share: share
    of the units drawn that are the first, the later ones are uniform (None = all are).
    """

    levels: tuple[int, ...] = (0, 1, 2)
    level_weights: tuple[float, ...] = (1.0, 1.0, 1.0)
    text_dropout: float = 0.1
    first_frame_share: float | None = None

    def unit_lengths(self, num_units: int, draws: TrainingDraws) -> list[int]:
        """Draw for each entry of `levels` how many latent frames its samples have; the last one is denoised.

        draws: one for each entry, the same for every worker.
        """
        share = self.first_frame_share
        first = draws.uniform() < (1 / num_units if share is None else share)
        later = 2 + (draws.uniform() * (num_units - 1)).floor().clamp(max=num_units - 2).long()
        return torch.where(first | (num_units == 1), 1, later).tolist()


@dataclass(frozen=True)
class Losses:
    """Losses of a batch: mean squared errors in float32 [B], their levels, and the weighted mean that is minimised."""

    values: Tensor
    levels: tuple[int, ...]
    total: Tensor

    def by_level(self) -> dict[int, float]:
        """Return the mean of each level that was trained."""
        levels = torch.tensor(self.levels)
        values = self.values.detach().cpu()
        return {level: float(values[levels == level].mean()) for level in sorted(set(self.levels))}


def transformer_losses(
    transformer: PyramidTransformer,
    schedule: PyramidSchedule,
    latents: Tensor,
    text: TextEmbedding,
    empty: TextEmbedding,
    samples: Sequence[int],
    lengths: Sequence[int],
    draws: TrainingDraws,
    objective: Objective,
) -> Losses:
    """Return the losses of clean normalised latents [B,C,T,h,w] with their prompts.

    empty: the encoded empty prompt, one row; samples: the rows' indices in the global batch, which choose their levels;
    lengths: see `Objective.unit_lengths`. The rows of a level go through the transformer together.
    """
    if not len(latents) == len(text) == len(samples):
        raise ShapeError("samples", f"[{len(latents)}]", (len(text), len(samples)))
    if len(lengths) != len(objective.levels):
        raise InvalidValueError("lengths", lengths, f"is not one per entry of levels {objective.levels}")
    text = with_dropout(text, empty, draws.uniform() < objective.text_dropout)
    columns = [sample % len(objective.levels) for sample in samples]
    values = latents.new_zeros(len(latents), dtype=torch.float32)
    for column, (level, length) in enumerate(zip(objective.levels, lengths, strict=True)):
        rows = [row for row, own in enumerate(columns) if own == column]
        if rows:
            clips = latents[rows, :, :length]
            sample = temporal_pyramid_sample(schedule, level, clips, draws.select(rows))
            loss = velocity_loss(velocity(transformer, sample, text.select(torch.tensor(rows))), sample.target)
            values = values.index_put((torch.tensor(rows, device=values.device),), loss)
    levels = tuple(objective.levels[column] for column in columns)
    weights = torch.tensor([objective.level_weights[level] for level in levels]).to(values)
    return Losses(values, levels, (weights * values).mean())


def velocity(transformer: PyramidTransformer, sample: TrainingSample, text: TextEmbedding) -> Tensor:
    """Return the transformer's answer to a training sample: [B,C,1,h,w]."""
    state = transformer.embed_text(text)
    history = transformer.embed_history(sample.history, sample.noisy.shape, state)
    conditioning = transformer.condition(sample.timestep.float(), state)
    answer: Tensor = transformer(sample.noisy, conditioning, state, history)
    return answer


def with_dropout(text: TextEmbedding, empty: TextEmbedding, dropped: Tensor) -> TextEmbedding:
    """Return the embeddings with those of some rows (bool [B]) replaced by the empty prompt's."""
    if len(empty) != 1:
        raise ShapeError("empty prompt", "[1,L,D]", tuple(empty.tokens.shape))
    rows = torch.where(dropped, len(text), torch.arange(len(text)))
    return concatenate([text, empty]).select(rows)


@torch.no_grad()
def initialise_transformer(transformer: PyramidTransformer) -> None:
    """Give a transformer its first weights, from torch's generator: its answer is 0, and no block changes a token.

    Linear maps, also those of patches, are Xavier uniform, those that feed conditioning and text std 0.02; modulations
    and the output are 0.
    """
    for module in transformer.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for embedder in (transformer.time_text_embed, transformer.context_embedder):
        for module in embedder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
    for module in transformer.modules():
        if isinstance(module, Modulation):
            nn.init.zeros_(module.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)


def optimizer_step(model: nn.Module, optimizer: Optimizer, loss: Tensor, max_grad_norm: float) -> float:
    """Backpropagate a loss, clip the gradient's norm, and step; returns the norm before clipping.

    If that is not finite, nothing is changed.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    if isinstance(norm, DTensor):  # the model's weights are sharded
        norm = norm.full_tensor()
    if norm.isfinite():
        optimizer.step()
    return float(norm)
