"""Settings of a training, and of the jobs that make its data."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_settings import SettingsConfigDict

from jobs.settings.base import MODEL, ClusterSettings, Count, JobSettings
from pyramid_flow.training.lora import ATTENTION


class PhaseSettings(BaseModel):
    """A part of a training."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    data: list[str] = Field(min_length=1, description="tables (.parquet), files or folders")
    steps: Count
    batch_size: Count
    num_frames: Count | None = Field(None, description="frames of a clip that are used (default: all)")
    crop: Count | None = Field(None, description="side in pixels of what is cut out of a clip (default: all of it)")


class TrainSettings(ClusterSettings):
    """Train the VAE or the transformer of a checkpoint, from new weights or from its own.

    The data are tables: clips with captions for the VAE (pyramid-render dataset world), encoded clips for the
    transformer (pyramid-render dataset encode). The same command goes on from the last checkpoint. OUTPUT/model is the
    checkpoint with the trained part in its place.

    Exit codes: 0 done, 1 it broke (run it again to resume), 2 the job is wrong, 130 or 143 interrupted.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render train")

    task: Literal["vae", "transformer"] = Field(description="what is trained")
    model: str = Field(min_length=1, description=MODEL)
    variant: str | None = Field(None, description="which transformer, if there are several")
    output: str = Field(min_length=1, description="folder for checkpoints, TensorBoard and the trained model")
    fresh: bool = Field(False, description="begin with new random weights instead of the checkpoint's")
    phases: list[PhaseSettings] = Field(min_length=1, description="data, steps and batch sizes, one after another")
    num_frames: Count | None = Field(None, description="frames of a clip that the transformer is trained on, 1 + 8k")
    levels: list[Annotated[int, Field(ge=0)]] = Field([0, 1, 2], description="levels that samples train in turn")
    level_weights: list[float] = Field(
        [1.0, 1.0, 1.0], min_length=3, max_length=3, description="weight of each level's loss"
    )
    text_dropout: Annotated[float, Field(ge=0, le=1)] = Field(0.1, description="share of prompts left empty")
    first_frame_share: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="share of samples that train the first frame (default: as any other)"
    )
    mse_weight: float = Field(1.0, description="weight of the VAE's squared error beside its L1")
    kl_weight: float = Field(1e-4, description="weight of the KL term of the VAE")
    foreground_weight: float = Field(4.0, description="extra weight of pixels unlike the commonest colour")
    lr: Annotated[float, Field(gt=0)] = Field(5e-5, description="learning rate after the warm-up")
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    weight_decay: float = Field(1e-4, description="of matrices and kernels")
    warmup_steps: Annotated[int, Field(ge=0)] = Field(1000, description="steps of the linear warm-up")
    decay: Literal["constant", "cosine"] = Field("constant", description="of the learning rate after the warm-up")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="gradients are clipped to this norm")
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="of a running mean of the weights, which is then the result (default: no mean)"
    )
    dtype: Literal["bfloat16", "float32"] = Field("bfloat16", description="of the arithmetic; weights are float32")
    compile: bool = Field(False, description="compile the transformer's blocks: minutes at first, faster steps after")
    gradient_checkpointing: bool = Field(False, description="compute blocks twice rather than keep what they computed")
    lora_rank: Count | None = Field(None, description="train adapters of this rank, and nothing else (default: all)")
    lora_alpha: Count | None = Field(None, description="adapters are scaled by alpha / rank (default: the rank)")
    lora_targets: list[str] = Field(
        list(ATTENTION), min_length=1, description="ends of the names of the linear maps that get an adapter"
    )
    workers: Count = Field(1, description="workers that share every batch")
    streams: Count | None = Field(
        None,
        description="streams of rows that a batch is taken from; keep it when workers change (default: workers)",
    )
    use_gpu: bool = Field(False, description="one GPU per worker")
    shard: bool = Field(False, description="split weights and AdamW's state between the workers (FSDP2)")
    cpus_per_worker: Annotated[float, Field(gt=0)] = Field(1.0, description="logical CPUs that a worker takes")
    seed: Annotated[int, Field(ge=0)] = Field(0, description="of weights, order and noise")
    checkpoint_steps: Count = Field(500, description="keep a checkpoint every so many steps")
    log_steps: Count = Field(50, description="show means every so many steps")
    example_steps: Count | None = Field(
        None, description="write videos to OUTPUT/examples every so many steps (default: never)"
    )
    example_count: Count = Field(4, description="videos that are written then, of a batch's first rows")
    max_restarts: Annotated[int, Field(ge=0)] = Field(3, description="restarts after lost workers before it gives up")

    @field_validator("levels")
    @classmethod
    def _known_levels(cls, value: list[int]) -> list[int]:
        if not value or max(value) > 2:
            raise ValueError("must name levels 0, 1 and 2")
        return value

    @model_validator(mode="after")
    def _even_shares(self) -> "TrainSettings":
        streams = self.streams or self.workers
        if streams % self.workers:
            raise ValueError(f"streams {streams} is not a multiple of workers {self.workers}")
        for phase in self.phases:
            if phase.batch_size % streams:
                raise ValueError(f"batch_size {phase.batch_size} is not a multiple of streams {streams}")
            if self.task == "transformer" and (phase.num_frames or phase.crop):
                raise ValueError("num_frames and crop of a phase cut clips for the VAE only")
        if self.task == "vae":
            for name in ("compile", "gradient_checkpointing", "lora_rank"):
                if getattr(self, name):
                    raise ValueError(f"{name} is for the transformer only")
        if self.fresh and self.lora_rank:
            raise ValueError("lora_rank trains adapters of a checkpoint's own weights, not of fresh ones")
        return self


class WorldSettings(JobSettings):
    """Write a table of clips of the toy's world: one shape that moves over a plain background, with a caption."""

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render dataset world")

    output: str = Field(min_length=1, description="Parquet file to write")
    count: Count = Field(description="number of clips")
    side: Annotated[int, Field(ge=64, multiple_of=64)] = Field(64, description="height and width in pixels")
    num_frames: Count = Field(33, description="frames of a clip, 1 + 8k")
    sizes: list[Literal["small", "medium", "large"]] = Field(
        ["small", "medium", "large"], min_length=1, description="sizes of the shapes"
    )
    seed: int = Field(0, description="of what is drawn")


class EncodeSettings(ClusterSettings):
    """Turn a table of clips into latents and text embeddings, with the VAE and text encoders of a checkpoint.

    A table has captions in a column `prompt`, and the clips' pixels (pyramid-render dataset world) or URIs of video
    files in a column `video`. A video that does not decode or is too short is left out, and the reason is said. Parts
    that are there already are left alone, so the same command goes on where it stopped.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render dataset encode")

    input: list[str] = Field(min_length=1, description="tables of clips, files or folders; may be repeated")
    output: str = Field(min_length=1, description="folder or URL for the encoded parts")
    model: str = Field(min_length=1, description=MODEL)
    variant: str | None = Field(None, description="which transformer's sizes and lengths, if there are several")
    video_root: str | None = Field(None, description="video URIs must lie below it (default: the input's folder)")
    height: Count | None = Field(None, description="of clips cut out of videos (default: the trained size)")
    width: Count | None = Field(None, description="of clips cut out of videos (default: the trained size)")
    num_frames: Count | None = Field(None, description="frames of such clips, 1 + 8k (default: the trained length)")
    fps: Annotated[float, Field(gt=0)] | None = Field(None, description="of such clips (default: the trained rate)")
    workers: Count = Field(1, description="workers that encode")
    use_gpu: bool = Field(False, description="one GPU per worker")
    dtype: Literal["bfloat16", "float32"] = Field("float32", description="of the VAE's and the encoders' weights")
