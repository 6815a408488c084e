"""What is trained on a table: each task turns rows into a loss, and its model into a part of a checkpoint."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from pipeline.tables.readers import InputPart
from pipeline.training.clips import CLIP_SCHEMA, ENCODED_SCHEMA, Frames, clips, encoded, pixels_of
from pyramid_flow import (
    CausalVideoVAE,
    Checkpoint,
    PyramidSchedule,
    SamplingParams,
    SeededNoise,
    generate_latents,
)
from pyramid_flow.checkpoints.diffusers_models import TransformerModel
from pyramid_flow.pixels import as_uint8, decode_frames
from pyramid_flow.sampling.params import SPATIAL_FACTOR, TEMPORAL_FACTOR
from pyramid_flow.training.draws import KeyedRandom, TrainingDraws
from pyramid_flow.training.lora import LoRA, add_lora
from pyramid_flow.training.step import Objective, initialise_transformer, transformer_losses
from pyramid_flow.training.vae import VAEObjective, initialise_vae, vae_losses


@dataclass(frozen=True)
class Loss:
    """What is minimised, and numbers to show, of the samples of one worker."""

    total: Tensor
    metrics: dict[str, float]


@dataclass(frozen=True)
class Phase:
    """A part of a training: row groups of its table, its steps and the samples of each.

    num_frames, crop: frames and side in pixels of what is cut out of a clip, None = all.
    """

    parts: tuple[InputPart, ...]
    steps: int
    batch_size: int
    num_frames: int | None = None
    crop: int | None = None


class Task(nn.Module, ABC):
    """A model and how a loss is made of it; `columns` of the table are read."""

    columns: tuple[str, ...]

    @property
    @abstractmethod
    def model(self) -> ModelMixin:
        """What is trained."""

    @abstractmethod
    def forward(self, table: pa.Table, samples: Sequence[int], step: int, phase: Phase) -> Loss:
        """Return the loss of rows; samples: their indices in the global batch."""

    @abstractmethod
    def examples(self, table: pa.Table) -> Frames:
        """Return videos that show what the model has learned, one per row: uint8 [B,N,H,W,3]."""


class VAETask(Task):
    """Trains a VAE on crops of clips; where they lie is drawn."""

    columns = tuple(CLIP_SCHEMA.names)

    def __init__(self, vae: CausalVideoVAE, objective: VAEObjective, seed: int) -> None:
        super().__init__()
        self.vae, self.objective, self.seed = vae, objective, seed

    @property
    def model(self) -> CausalVideoVAE:
        """The VAE."""
        return self.vae

    def forward(self, table: pa.Table, samples: Sequence[int], step: int, phase: Phase) -> Loss:
        """Cut the clips, and reconstruct them."""
        draws = KeyedRandom(self.seed, step, samples)
        cut = crops(clips(table), phase, draws)
        pixels = torch.stack([pixels_of(clip) for clip in cut]).to(self.model.device)
        losses = vae_losses(self.vae, pixels, draws, self.objective)
        parts = {"l1": losses.l1, "mse": losses.mse, "kl": losses.kl}
        return Loss(losses.total, {name: float(value.detach()) for name, value in parts.items()})

    @torch.no_grad()
    def examples(self, table: pa.Table) -> Frames:
        """Return the clips, each beside what becomes of it."""
        whole = np.stack(clips(table))
        pixels = torch.stack([pixels_of(clip) for clip in whole]).to(self.model.device)
        made = as_uint8(self.vae.decode(self.vae.encode_moments(pixels).mean)).cpu().numpy()
        return np.concatenate([whole, made], axis=3)


class TransformerTask(Task):
    """Trains a transformer of a checkpoint on encoded clips.

    num_units: latent frames of a clip that are used, at most.
    """

    columns = tuple(ENCODED_SCHEMA.names)

    def __init__(
        self,
        checkpoint: Checkpoint,
        transformer: TransformerModel,
        num_units: int,
        objective: Objective,
        seed: int,
    ) -> None:
        super().__init__()
        self.checkpoint, self.transformer = checkpoint, transformer
        self.num_units, self.objective, self.seed = num_units, objective, seed
        self.schedule = PyramidSchedule()

    @property
    def model(self) -> TransformerModel:
        """The transformer."""
        return self.transformer

    def forward(self, table: pa.Table, samples: Sequence[int], step: int, phase: Phase) -> Loss:
        """Noise the latents, and ask the transformer for the velocity."""
        rows = encoded(table, self.num_units)
        device = self.model.device
        losses = transformer_losses(
            self.transformer,
            self.schedule,
            self.checkpoint.preset.statistics.normalize(rows.latents).to(device),
            rows.text,
            rows.empty,
            [sample + step for sample in samples],  # so that every stream of rows trains every level
            self.lengths(step),
            KeyedRandom(self.seed, step, samples),
            self.objective,
        )
        return Loss(losses.total, {f"level{level}": value for level, value in losses.by_level().items()})

    def lengths(self, step: int) -> list[int]:
        """Return how many latent frames the samples of each entry of the objective's levels have in a step.

        They are the same for every worker, since they are keyed by no sample of anyone's batch.
        """
        common = KeyedRandom(self.seed, step, [-1 - column for column in range(len(self.objective.levels))])
        return self.objective.unit_lengths(self.num_units, common)

    @torch.no_grad()
    def examples(self, table: pa.Table) -> Frames:
        """Render the rows' prompts as the checkpoint's preset says."""
        rows, preset, device = encoded(table, self.num_units), self.checkpoint.preset, self.model.device
        params = SamplingParams(
            height=SPATIAL_FACTOR * rows.latents.shape[3],
            width=SPATIAL_FACTOR * rows.latents.shape[4],
            num_frames=1 + TEMPORAL_FACTOR * (self.num_units - 1),
            num_inference_steps=preset.num_inference_steps,
            video_num_inference_steps=preset.video_num_inference_steps,
            guidance_scale=preset.guidance_scale,
            video_guidance_scale=preset.video_guidance_scale,
        )
        noise = SeededNoise(range(len(table)), self.schedule.gamma)
        latents = generate_latents(self.transformer, self.schedule, rows.text, rows.empty, params, noise)
        vae = self.checkpoint.load_vae(torch.float32, device)
        frames: Frames = torch.cat(list(decode_frames(vae, latents, preset.statistics)), dim=1).numpy()
        return frames


@dataclass(frozen=True)
class VAESource:
    """Makes the task that trains a checkpoint's VAE; fresh: with first weights instead of its own."""

    path: str
    fresh: bool
    objective: VAEObjective
    seed: int

    def __call__(self) -> VAETask:
        """Load the VAE."""
        vae = Checkpoint.open(self.path).load_vae(torch.float32, "cpu").train().requires_grad_(True)
        if self.fresh:
            initialise_vae(vae)
        return VAETask(vae, self.objective, self.seed)


@dataclass(frozen=True)
class TransformerSource:
    """Makes the task that trains a checkpoint's transformer.

    fresh: with first weights instead of its own; lora: train adapters alone; gradient_checkpointing: compute blocks
    again for the gradient rather than keep what they computed.
    """

    path: str
    variant: str | None
    fresh: bool
    num_units: int
    objective: Objective
    seed: int
    lora: LoRA | None = None
    gradient_checkpointing: bool = False

    def __call__(self) -> TransformerTask:
        """Load the transformer."""
        checkpoint = Checkpoint.open(self.path, self.variant)
        transformer = checkpoint.load_transformer(torch.float32, "cpu").train().requires_grad_(True)
        if self.fresh:
            initialise_transformer(transformer)
        if self.lora:
            add_lora(transformer, self.lora)
        if self.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        return TransformerTask(checkpoint, transformer, self.num_units, self.objective, self.seed)


def crops(whole: Sequence[Frames], phase: Phase, draws: TrainingDraws) -> list[Frames]:
    """Cut clips [N,H,W,3] to the frames and the side that a phase asks for. Draws, per sample: frame, y, x."""
    shares = torch.stack([draws.uniform() for _ in range(3)], dim=1).tolist()
    return [_crop(clip, phase, *share) for clip, share in zip(whole, shares, strict=True)]


def _crop(clip: Frames, phase: Phase, *shares: float) -> Frames:
    wanted = (phase.num_frames, phase.crop, phase.crop)
    for axis, (length, share) in enumerate(zip(wanted, shares, strict=True)):
        if length is not None and length < clip.shape[axis]:
            start = int(share * (clip.shape[axis] - length + 1))
            clip = clip.take(range(start, start + length), axis)
    return clip
