"""Settings of the service."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import SettingsConfigDict

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
    TileSide,
    labels_by_stage,
)
from pipeline.stages import STAGES
from pyramid_flow.memory.modes import Memory


class ServeSettings(ClusterSettings):
    """Answer the Videos API: videos are asked for by HTTP, wait in a database, and are made by the farm's stages.

    Without API keys it serves this machine only. Stop it with Ctrl-C: what is being made waits for the next start.

    Exit codes: 1 it broke, 2 it cannot start as asked, 130 or 143 stopped.
    """

    model_config = SettingsConfigDict(cli_prog_name="pyramid-render serve")

    model: str = Field("toy", min_length=1, description=STORED_MODEL)
    variant: str | None = Field(None, description=VARIANT)
    lora: list[str] = Field([], description=LORA)
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
    redirect_downloads: bool = Field(
        False, description="answer downloads of videos with signed URLs of the object store"
    )
    allow_image_host: Hosts = Field([], description="fetch pictures by URL from this host; may be repeated")
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
    scale_down_s: Annotated[float, Field(ge=0)] = Field(
        600, description="seconds without work until a worker beyond the fewest ends"
    )
    encode_replicas: Count = Field(1, description="workers that encode prompts and images")
    decode_replicas: Count = Field(1, description="workers that decode videos")
    encode_gpus: Annotated[float, Field(ge=0)] = Field(0.1, description="share of a GPU of each")
    sample_gpus: Annotated[float, Field(ge=0)] = Field(0.6, description="share of a GPU of each")
    decode_gpus: Annotated[float, Field(ge=0)] = Field(0.3, description="share of a GPU of each")
    gpus_per_clip: Count = Field(1, description=GPUS_PER_CLIP + "; a worker that samples has them to itself")
    place: list[str] = Field([], description=PLACE.format("encode, sample, decode and publish"))
    threads: Count = Field(1, description="CPU threads of each worker")
    decode_window: Count = Field(1, description="latent frames decoded at a time")
    memory: Memory = Field("auto", description=MEMORY)
    tile: TileSide = Field("auto", description=TILE)
    cache_gib: CacheGiB = Field("auto", description=CACHE)
    max_live: Annotated[int, Field(ge=0)] = Field(
        4, description="videos that a decoder shows while they are sampled; each holds 2 (384p) to 8 (768p) GiB"
    )
    render_s: Annotated[float, Field(gt=0)] = Field(
        1800, description="seconds after which a worker that has not finished a batch is ended"
    )
    batch_size: Count = Field(4, description="videos of one shape that are sampled together, at most")
    max_queued: Count = Field(1000, description="videos that may wait; more are answered 429")
    max_unfinished: Count = Field(100, description="unfinished videos of one key")
    max_per_minute: Count = Field(60, description="requests for videos that one key may send in a minute")
    max_kept: Count = Field(10_000, description="videos of one key that are kept, with their files")
    max_attempts: Count = Field(3, description="lost workers after which a video fails")
    retention_h: Annotated[float, Field(gt=0)] = Field(24.0, description="hours that a finished video is kept")

    @field_validator("place")
    @classmethod
    def _labels_of_stages(cls, value: list[str]) -> list[str]:
        labels_by_stage(value, STAGES)
        return value

    @property
    def places(self) -> dict[str, dict[str, str]]:
        """Labels of the nodes that a stage may run on."""
        return labels_by_stage(self.place, STAGES)


def webhook_secret() -> str | None:
    """Return what webhooks are signed with: a secret has no flag, which others could read."""
    return os.environ.get("PYRAMID_RENDER_WEBHOOK_SECRET")
