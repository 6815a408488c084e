"""Settings of the jobs: a YAML file and flags become one validated, frozen value."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import pydantic_settings
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, PydanticBaseSettingsSource, SettingsConfigDict

from pipeline.fetch import host_name
from pipeline.plan import Layout
from pyramid_flow.training.lora import ATTENTION

EXIT_BROKEN, EXIT_WRONG_JOB, EXIT_INTERRUPTED = 1, 2, 130
OWN_CLUSTER = "local"
MODEL = 'checkpoint folder in the published layout, or "toy" for the bundled model'

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, le=1)]


class SettingsError(Exception):
    """The job is wrong; said in one message before anything is loaded."""


class JobSettings(BaseSettings):
    """Base of all settings: flags win over the YAML file, and unknown names are errors."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        cli_enforce_required=False,
        cli_exit_on_error=False,
    )

    config: Path | None = Field(None, description="YAML file with any of these settings; flags win over it")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take no setting from a variable of its name: a stray HEIGHT or MODEL must not change a job."""
        return (init_settings,)


class ClusterSettings(JobSettings):
    """Base of the settings of jobs that run on Ray."""

    address: str = Field(
        default_factory=lambda: os.environ.get("RAY_ADDRESS") or OWN_CLUSTER,
        description='a running Ray cluster, such as "auto", or "local" for one of its own (default: RAY_ADDRESS, '
        "which is set in a submitted job, else local)",
    )

    @property
    def own_cluster(self) -> bool:
        """Whether the job starts a Ray cluster of its own on this machine."""
        return self.address == OWN_CLUSTER


class DemoSettings(JobSettings):
    """Render the sample table with the bundled model on this machine's CPU: shapes that move as the prompt says."""

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render demo")

    output: str = Field("outputs/demo", min_length=1, description="folder for videos, ledger and gallery")


class StatusSettings(JobSettings):
    """Say how far the jobs of an output are: rows done, rate, time left, failures by reason."""

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render status")

    output: CliPositionalArg[str] = Field(min_length=1, description="folder or URL that render writes to")


class CompactSettings(JobSettings):
    """Merge the parts of an output's ledger into few, and list its orphans: files that no row names.

    The ledger says the same before, meanwhile and after. Jobs may go on: parts of a run that is alive are left alone.

    Exit codes: 0 done, 1 it broke midway (nothing is lost, run it again), 2 there is no ledger or it is damaged,
    130 interrupted.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render compact")

    output: CliPositionalArg[str] = Field(min_length=1, description="folder or URL that render writes to")
    delete_orphans: bool = Field(False, description="delete the orphans that are older than 24 hours")


class RenderSettings(ClusterSettings):
    """Render a table of prompts to videos.

    The input's columns are the fields of a request: prompt (required), id, negative_prompt, image (bytes or a URI),
    height, width, num_frames, fps, num_inference_steps, video_num_inference_steps, guidance_scale,
    video_guidance_scale, seed, num_videos_per_prompt. Other columns are carried through to the ledger. Running the
    same command again renders only what is missing.

    Exit codes: 0 every row succeeded, 1 the job broke (run it again to resume), 2 the job is wrong, 3 some rows
    failed, 130 or 143 interrupted.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render render")

    input: list[str] = Field(
        min_length=1, description=".parquet, .csv, .jsonl files or folders, local or URLs; may be repeated"
    )
    output: str = Field(min_length=1, description="folder or URL (s3://, gs://, ...) for videos, ledger and gallery")
    model: str = Field(min_length=1, description=MODEL)
    variant: str | None = Field(None, description='"384p", "768p", "image" or a folder name, if there are several')
    image_root: str | None = Field(None, description="image URIs must lie below it (default: the input's folder)")
    allow_image_host: list[str] = Field([], description="fetch http(s) images from this host; may be repeated")
    shard: str | None = Field(None, description="i/n: render the i-th of n parts of the input, n jobs share one output")
    allow_untrained: bool = Field(False, description="accept sizes and lengths the model was not trained for")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = cuda if there is a GPU")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto = float32 on cpu, else bfloat16")
    gpus: Annotated[int, Field(ge=0)] | None = Field(None, description="GPUs to plan for (default: those there are)")
    layout: Layout = Field(
        "auto",
        description="staged: workers that encode, others that sample and decode side by side, others that publish; "
        "fused: workers that do it all in turn; auto: fused without GPUs",
    )
    batch_size: Count = Field(4, description="rows of one shape sampled together, at most")
    encode_workers: Count | None = Field(None, description="pin the number of encode workers")
    sample_workers: Count | None = Field(None, description="pin the number of workers that sample and decode")
    publish_workers: Count | None = Field(None, description="pin the number of publish workers")
    encode_gpus: Share | None = Field(None, description="pin the share of a GPU that an encode worker takes")
    sample_gpus: Share | None = Field(None, description="pin the share of a GPU that a sample worker takes")
    ffmpeg_threads: Count | None = Field(None, description="pin the threads of ffmpeg, which are also a worker's CPUs")
    decode_window: Count = Field(1, description="latent frames decoded at a time")
    tile: int | None = Field(None, ge=64, description="side of a VAE tile in pixels (default: no tiling)")
    ledger_rows: Count = Field(1000, description="write a ledger part after this many rows")
    ledger_seconds: Annotated[float, Field(gt=0)] = Field(30, description="or after this many seconds")
    max_attempts: Count = Field(3, description="give a row up after its worker died this often while it ran alone")
    row_timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None, description="end a worker whose row takes longer than this in one stage (default: no limit)"
    )
    max_failures: Count = Field(20, description="end the job after so many failures in a row that are no row's fault")
    grace_s: Annotated[float, Field(ge=0)] = Field(
        60, description="seconds an interrupted job waits for rows in flight"
    )
    stall_s: Annotated[float, Field(gt=0)] = Field(
        1800, description="end the job after so many seconds in which no worker had a row, such as for lack of GPUs"
    )
    retry_failed: bool = Field(False, description="render rows again that failed in an earlier run")
    allow_failed: str = Field(
        "0", coerce_numbers_to_str=True, description="exit 0 with up to this many failed rows: a count or a percentage"
    )
    calibrate: bool = Field(False, description="render two batches of each shape first, and plan by what they cost")
    gpu_hour_price: Annotated[float, Field(ge=0)] | None = Field(
        None, description="price of an hour of one GPU, to print what the job is expected to cost"
    )
    dry_run: bool = Field(False, description="print the plan, its expected speed and cost, and stop")

    @field_validator("allow_failed")
    @classmethod
    def _count_or_percentage(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9]+|([0-9]+(\.[0-9]*)?|\.[0-9]+)%", value):
            raise ValueError("must be a count or a percentage, such as 10 or 5%")
        return value

    @field_validator("tile")
    @classmethod
    def _whole_latents(cls, value: int | None) -> int | None:
        if value is not None and value % 32:
            raise ValueError("must be a multiple of 32")
        return value

    @field_validator("allow_image_host")
    @classmethod
    def _hosts(cls, value: list[str]) -> list[str]:
        return [host_name(host) for host in value]

    @field_validator("shard")
    @classmethod
    def _one_of_several(cls, value: str | None) -> str | None:
        if value is not None and not (re.fullmatch(r"[1-9][0-9]*/[1-9][0-9]*", value) and Fraction(value) <= 1):
            raise ValueError("must be i/n with 1 <= i <= n, such as 1/4")
        return value

    @property
    def shard_of(self) -> tuple[int, int]:
        """The number of the part to render, from 1, and of how many."""
        number, count = (self.shard or "1/1").split("/")
        return int(number), int(count)

    @property
    def workers(self) -> dict[str, int]:
        """Pinned pool sizes by the name of the first stage."""
        return self._pinned("workers", ("encode", "sample", "publish"))

    @property
    def gpu_shares(self) -> dict[str, float]:
        """Pinned shares of a GPU by the name of the first stage."""
        return self._pinned("gpus", ("encode", "sample"))

    def _pinned(self, what: str, pools: Sequence[str]) -> dict[str, Any]:
        pinned = {pool: getattr(self, f"{pool}_{what}") for pool in pools}
        return {pool: value for pool, value in pinned.items() if value is not None}

    def tolerates(self, failed: int, total: int) -> bool:
        """Tell whether so many failed rows are fine."""
        if self.allow_failed.endswith("%"):
            return failed <= total * float(self.allow_failed[:-1]) / 100
        return failed <= int(self.allow_failed)


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

    The data are tables: clips with captions for the VAE (jobs/dataset.py world), encoded clips for the transformer
    (jobs/dataset.py encode). The same command goes on from the last checkpoint. OUTPUT/model is the checkpoint with
    the trained part in its place.

    Exit codes: 0 done, 1 it broke (run it again to resume), 2 the job is wrong, 130 or 143 interrupted.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m jobs.train")

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

    model_config = SettingsConfigDict(cli_prog_name="python -m jobs.dataset world")

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

    A table has captions in a column `prompt`, and the clips' pixels (jobs/dataset.py world) or URIs of video files in a
    column `video`. A video that does not decode or is too short is left out, and the reason is said. Parts that are
    there already are left alone, so the same command goes on where it stopped.
    """

    model_config = SettingsConfigDict(cli_prog_name="python -m jobs.dataset encode")

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


class ServeSettings(ClusterSettings):
    """Answer the Videos API: videos are asked for by HTTP, wait in a database, and are made by the farm's stages.

    Without API keys it serves this machine only. Stop it with Ctrl-C: what is being made waits for the next start.

    Exit codes: 1 it broke, 2 it cannot start as asked, 130 or 143 stopped.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render serve")

    model: str = Field("toy", min_length=1, description=MODEL)
    variant: str | None = Field(None, description="which transformer, if there are several")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = cuda if there is one")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto = float32 on cpu, else bfloat16")
    host: str = Field("127.0.0.1", description="address to listen at; any but this machine's own needs API keys")
    port: Annotated[int, Field(ge=1, le=65535)] = Field(8000, description="port to listen at")
    output: str = Field("outputs/service", min_length=1, description="folder or URL for the videos")
    database: str | None = Field(
        None, description="postgresql://... or sqlite:///FILE (default: a file in the output folder)"
    )
    api_keys: str | None = Field(
        default_factory=lambda: os.environ.get("PYRAMID_RENDER_API_KEYS"),
        description="NAME:SHA256,... of the keys that are good (default: PYRAMID_RENDER_API_KEYS)",
    )
    keys_file: Path | None = Field(None, description="file with a line NAME:SHA256 per key")
    webhook_url: str | None = Field(
        None, description="is told the end of each video, signed with the secret in PYRAMID_RENDER_WEBHOOK_SECRET"
    )
    new_key: str | None = Field(None, description="make a key for a name, print it and its line, and end")
    auth: bool = Field(True, description="ask for API keys, if there are some; without it on 127.0.0.1 only")
    print_config: bool = Field(False, description="print the file for `serve deploy`, and end")
    sample_replicas: Count = Field(1, description="workers that sample, at most")
    min_sample_replicas: Annotated[int, Field(ge=0)] | None = Field(
        None, description="as few when nothing waits, 0 = none (default: as many as at most)"
    )
    encode_replicas: Count = Field(1, description="workers that encode prompts and images")
    decode_replicas: Count = Field(1, description="workers that decode videos")
    encode_gpus: Annotated[float, Field(ge=0)] = Field(0.1, description="share of a GPU of each")
    sample_gpus: Annotated[float, Field(ge=0)] = Field(0.6, description="share of a GPU of each")
    decode_gpus: Annotated[float, Field(ge=0)] = Field(0.3, description="share of a GPU of each")
    threads: Count = Field(1, description="CPU threads of each worker")
    batch_size: Count = Field(4, description="videos of one shape that are sampled together, at most")
    max_queued: Count = Field(1000, description="videos that may wait; more are answered 429")
    max_unfinished: Count = Field(100, description="unfinished videos of one key")
    max_per_minute: Count = Field(60, description="videos that one key may ask for in a minute")
    max_attempts: Count = Field(3, description="lost workers after which a video fails")
    retention_h: Annotated[float, Field(gt=0)] = Field(24.0, description="hours that a finished video is kept")


def webhook_secret() -> str | None:
    """Return what webhooks are signed with: a secret has no flag, which others could read."""
    return os.environ.get("PYRAMID_RENDER_WEBHOOK_SECRET")


Settings = TypeVar("Settings", bound=JobSettings)


def parse(cls: type[Settings], argv: Sequence[str]) -> Settings:
    """Parse flags over the YAML file that --config names; on a wrong setting print one message and exit with 2."""
    try:
        values = _yaml_values(_config_path(argv))
        _check_names(cls, values)
        return CliApp.run(cls, cli_args=list(argv), **values)
    except (ValidationError, SettingsError, pydantic_settings.SettingsError) as error:
        print(f"{cls.model_config.get('cli_prog_name')}: {_message(error)}", file=sys.stderr)
        raise SystemExit(EXIT_WRONG_JOB) from error


def _config_path(argv: Sequence[str]) -> str | None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    try:
        path: str | None = parser.parse_known_args(argv)[0].config
    except argparse.ArgumentError as error:
        raise SettingsError(str(error)) from error
    return path


def _yaml_values(path: str | None) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"config {path} cannot be read: {error}") from error
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise SettingsError(f"config {path} is not a mapping of settings")
    return values


def _check_names(cls: type[JobSettings], values: dict[str, Any]) -> None:
    unknown = sorted(set(values) - set(cls.model_fields))
    if unknown:
        raise SettingsError(f"config has no setting {unknown[0]!r}; there are: {', '.join(cls.model_fields)}")


def _message(error: ValidationError | SettingsError | pydantic_settings.SettingsError) -> str:
    """Say in one line what is wrong first."""
    if not isinstance(error, ValidationError):
        return " ".join(str(error).removeprefix("error parsing CLI: ").split())
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"]).replace("_", "-")
    if first["type"] == "missing":
        return f"--{name} is missing (see --help)"
    return f"{name} {first['input']!r}: {first['msg'].removeprefix('Value error, ')}"
