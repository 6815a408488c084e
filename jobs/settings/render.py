"""Settings of the jobs that render, and of those that look after what was rendered."""

import re
from collections.abc import Sequence
from dataclasses import fields
from fractions import Fraction
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import CliPositionalArg, SettingsConfigDict

from jobs.settings.base import (
    CACHE,
    GPUS_PER_CLIP,
    LORA,
    MEMORY,
    PLACE,
    STORED_MODEL,
    TILE,
    VARIANT,
    CacheGiB,
    ClusterSettings,
    Count,
    Hosts,
    JobSettings,
    TileSide,
    labels_by_stage,
)
from pipeline.media.provenance import KEY
from pipeline.media.quality import STANDARD, Thresholds
from pipeline.stages import Layout
from pyramid_flow.memory.modes import Memory

Share = Annotated[float, Field(gt=0, le=1)]
Limit = Annotated[float, Field(ge=0, le=1)]
Price = Annotated[float, Field(ge=0)] | None

POOLS = ("encode", "sample", "publish")
"""What can be pinned and placed, by the first stage; decoding is where sampling is."""


class DemoSettings(JobSettings):
    """Render the sample table with the bundled model on this machine's CPU: shapes that move as the prompt says."""

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render demo")

    output: str = Field("outputs/demo", min_length=1, description="folder for videos, ledger and gallery")


class StatusSettings(JobSettings):
    """Say how far the jobs of an output are: rows done, rate, time left, failures by reason."""

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render status")

    output: CliPositionalArg[str] = Field(min_length=1, description="folder or URL that render writes to")


class ReportSettings(JobSettings):
    """Write report.html into an output: gallery with players, timeline, histograms, failures, throughput and cost.

    A job writes it by itself, while it runs and at its end. Exit codes: 0 written, 2 there is no ledger, or it cannot
    be read, or the report cannot be written.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render report")

    output: CliPositionalArg[str] = Field(min_length=1, description="folder or URL that render writes to")
    gpu_hour_price: Price = Field(None, description="price of an hour of one GPU, to show what the videos cost")


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
    """Render a table of prompts to videos and stills (num_frames 1).

    The input's columns are the fields of a request: prompt (required), id, negative_prompt, image (bytes or a URI),
    image_fit (crop or pad), image_format (of a still: png or webp), height, width, num_frames, fps,
    num_inference_steps, video_num_inference_steps, guidance_scale, video_guidance_scale, guidance_decay,
    min_guidance_scale, quality (draft, standard or high), skip_last_step, guided_share, seed, num_videos_per_prompt.
    Other columns are carried through to the ledger. Running the same command again renders only what is missing.

    Exit codes: 0 every row succeeded, 1 the job broke (run it again to resume), 2 the job is wrong, 3 some rows
    failed, 130 or 143 interrupted.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render render")

    input: list[str] = Field(
        min_length=1, description=".parquet, .csv, .jsonl files or folders, local or URLs; may be repeated"
    )
    output: str = Field(min_length=1, description="folder or URL (s3://, gs://, ...) for videos, ledger and gallery")
    model: str = Field(min_length=1, description=STORED_MODEL)
    variant: str | None = Field(None, description=VARIANT)
    lora: list[str] = Field([], description=LORA)
    image_root: str | None = Field(None, description="image URIs must lie below it (default: the input's folder)")
    allow_image_host: Hosts = Field([], description="fetch http(s) images from this host; may be repeated")
    limit: Count | None = Field(None, description="render only the first rows of the table, to try it")
    shard: str | None = Field(None, description="i/n: render the i-th of n parts of the input, n jobs share one output")
    allow_untrained: bool = Field(False, description="accept sizes and lengths the model was not trained for")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto = cuda if there is a GPU")
    dtype: Literal["auto", "bfloat16", "float32"] = Field("auto", description="auto = float32 on cpu, else bfloat16")
    gpus: Annotated[int, Field(ge=0)] | None = Field(None, description="GPUs to plan for (default: those there are)")
    cpus: Count | None = Field(None, description="CPU cores to plan for (default: those there are)")
    gpus_per_clip: Count = Field(1, description=GPUS_PER_CLIP)
    place: list[str] = Field([], description=PLACE.format("encode, sample (which decodes too) and publish"))
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
    memory: Memory = Field("auto", description=MEMORY)
    tile: TileSide = Field("auto", description=TILE)
    cache_gib: CacheGiB = Field("auto", description=CACHE)
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
    black_below: Limit = Field(STANDARD.black_below, description="flag `black`: mean brightness, 0 to 1, is below this")
    white_above: Limit = Field(STANDARD.white_above, description="flag `white`: mean brightness is above this")
    flat_below: Limit = Field(
        STANDARD.flat_below, description="flag `flat`: contrast, the standard deviation of brightness, is below this"
    )
    frozen_below: Limit = Field(
        STANDARD.frozen_below, description="flag `frozen`: motion, the mean change from frame to frame, is below this"
    )
    jump_above: Limit = Field(
        STANDARD.jump_above, description="flag `jump`: the greatest change from one frame to the next is above this"
    )
    image_text_model: str | None = Field(
        None,
        min_length=1,
        description="folder of a CLIP model, on every node: the ledger gets text_similarity and aesthetics",
    )
    c2pa_certificate: str | None = Field(
        None,
        min_length=1,
        description="PEM file of a certificate and its issuers: sign a C2PA manifest into every video and still (extra "
        f"`c2pa`); the private key comes from {KEY} in the environment, on every node",
    )
    reroll: Annotated[int, Field(ge=0)] = Field(
        0,
        description="render flagged rows again, each at most so many times, with another seed even if they brought one "
        "(`rerolls` and `first_seed` in the ledger tell)",
    )
    calibrate: bool = Field(False, description="render two batches of each shape first, and plan by what they cost")
    gpu_hour_price: Price = Field(
        None, description="price of an hour of one GPU, to say what the job is expected to cost, and has cost"
    )
    dry_run: bool = Field(False, description="print the plan, its expected speed and cost, and stop")

    @field_validator("allow_failed")
    @classmethod
    def _count_or_percentage(cls, value: str) -> str:
        if not re.fullmatch(r"[0-9]+|([0-9]+(\.[0-9]*)?|\.[0-9]+)%", value):
            raise ValueError("must be a count or a percentage, such as 10 or 5%")
        return value

    @field_validator("shard")
    @classmethod
    def _one_of_several(cls, value: str | None) -> str | None:
        if value is not None and not (re.fullmatch(r"[1-9][0-9]*/[1-9][0-9]*", value) and Fraction(value) <= 1):
            raise ValueError("must be i/n with 1 <= i <= n, such as 1/4")
        return value

    @field_validator("place")
    @classmethod
    def _labels_of_stages(cls, value: list[str]) -> list[str]:
        labels_by_stage(value, POOLS)
        return value

    @property
    def places(self) -> dict[str, dict[str, str]]:
        """Labels of the nodes that a pool may run on, by the name of its first stage."""
        return labels_by_stage(self.place, POOLS)

    @property
    def shard_of(self) -> tuple[int, int]:
        """The number of the part to render, from 1, and of how many."""
        number, count = (self.shard or "1/1").split("/")
        return int(number), int(count)

    @property
    def workers(self) -> dict[str, int]:
        """Pinned pool sizes by the name of the first stage."""
        return self._pinned("workers", POOLS)

    @property
    def gpu_shares(self) -> dict[str, float]:
        """Pinned shares of a GPU by the name of the first stage."""
        return self._pinned("gpus", ("encode", "sample"))

    def _pinned(self, what: str, pools: Sequence[str]) -> dict[str, Any]:
        pinned = {pool: getattr(self, f"{pool}_{what}") for pool in pools}
        return {pool: value for pool, value in pinned.items() if value is not None}

    @property
    def thresholds(self) -> Thresholds:
        """Limits of the flags of videos and stills."""
        return Thresholds(**{field.name: getattr(self, field.name) for field in fields(Thresholds)})

    def tolerates(self, failed: int, total: int) -> bool:
        """Tell whether so many failed rows are fine."""
        if self.allow_failed.endswith("%"):
            return failed <= total * float(self.allow_failed[:-1]) / 100
        return failed <= int(self.allow_failed)
